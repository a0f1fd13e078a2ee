"""The recurrent state of a model: what one piece of a sequence leaves for the next."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rwkv_miss.config import ModelConfig


@dataclass
class State:
    """L layers, B sequences, C = n_embd, H heads of N.

    att_shift: (L, B, C) the last token's input of each time mix, in the model's dtype.
    wkv: (L, B, H, N_value, N_key) fp32 (float64 in a float64 model).
    ffn_shift: (L, B, C) the last token's input of each channel mix.
    """

    att_shift: Tensor
    wkv: Tensor
    ffn_shift: Tensor

    @classmethod
    def zeros(cls, config: ModelConfig, batch: int, dtype: torch.dtype, device: torch.device | str) -> State:
        shift = torch.zeros(config.n_layer, batch, config.n_embd, dtype=dtype, device=device)
        wkv = torch.zeros(
            (config.n_layer, batch, config.n_head, config.head_size, config.head_size),
            dtype=torch.float64 if dtype == torch.float64 else torch.float32,
            device=device,
        )
        return cls(shift, wkv, shift.clone())

    def detach(self) -> State:
        """The same state; no gradient flows back through it."""
        return State(self.att_shift.detach(), self.wkv.detach(), self.ffn_shift.detach())

    def layer(self, i: int) -> tuple[Tensor, Tensor, Tensor]:
        return self.att_shift[i], self.wkv[i], self.ffn_shift[i]
