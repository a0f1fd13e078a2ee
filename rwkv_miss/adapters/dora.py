"""DoRA (arXiv 2402.09353): the rows of V = W + s B A get trained lengths m,

    y = (m / n) V x,   n = |V| row by row, without a gradient of its own (section 4.3).

m starts as |W|. A row of W that is zero has no direction and stays so. Dropout is PEFT's: W x is computed from all of x
once, and only what DoRA adds to it from what is left.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rwkv_miss.adapters.low_rank import A_NAME, B_NAME, LowRank, LowRankLinear, wide_zeros
from rwkv_miss.adapters.method import Factors
from rwkv_miss.config import AdapterConfig
from rwkv_miss.model.linear import FrozenLinear

_M = "lora_magnitude_vector"
# Elements of the weight whose rows are measured at a time.
_PIECE = 2**20


class DoraLinear(LowRankLinear):
    """Keeps V x for the backward pass, beside what `LowRankLinear` does. Each forward pass reads W once more, in pieces
    of rows."""

    def __init__(self, linear: FrozenLinear, r: int, scale: float, dropout: float) -> None:
        super().__init__(linear, r, scale, dropout)
        self.lora_magnitude_vector = nn.Parameter(wide_zeros(linear, linear.out_features))

    def forward(self, x: Tensor) -> Tensor:
        dropped = F.dropout(x, self.dropout, self.training)
        Vx = self.base_layer(dropped) + self.branch(dropped, self.A, self.B)
        # The factor less 1: 1 + a little would be rounded to 1 in bf16.
        y = Vx + (self.lora_magnitude_vector / self.lengths() - 1).to(x.dtype) * Vx
        if not (self.training and self.dropout):
            return y
        return y + self.base_layer(x - dropped)

    @torch.no_grad()
    def lengths(self) -> Tensor:
        """|V| (out_features,), in the adapter's dtype."""
        found = torch.empty_like(self.lora_magnitude_vector)
        step = max(1, _PIECE // self.base_layer.in_features)
        for at in range(0, len(found), step):
            piece = slice(at, at + step)
            W = self.base_layer.rows(at, min(at + step, len(found))).to(found.dtype)
            found[piece] = row_lengths(torch.addmm(W, self.B[piece], self.A, alpha=self.scale))
        return found


def row_lengths(V: Tensor) -> Tensor:
    """|V| of each row, and the smallest normal number for a row of zeros."""
    return torch.linalg.vector_norm(V, dim=1).clamp_min(torch.finfo(V.dtype).tiny)


class Dora(LowRank):
    names = (A_NAME, B_NAME, _M)
    use_dora = True

    def wrap(self, linear: FrozenLinear, config: AdapterConfig) -> nn.Module:
        return DoraLinear(linear, config.r, self.scale(config), config.dropout)

    @torch.no_grad()
    def start(self, module: nn.Module, config: AdapterConfig) -> None:
        super().start(module, config)
        assert isinstance(module, DoraLinear)
        module.lora_magnitude_vector.copy_(module.lengths())

    def shapes(self, in_features: int, out_features: int, config: AdapterConfig) -> dict[str, tuple[int, ...]]:
        return {**super().shapes(in_features, out_features, config), _M: (out_features,)}

    def factors(
        self, tensors: Mapping[str, Tensor], shape: torch.Size, config: AdapterConfig, exact: bool = True
    ) -> Factors | None:
        return None

    def from_factors(self, factors: Factors, config: AdapterConfig) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        return None

    def delta(self, W: Tensor, start: int, tensors: Mapping[str, Tensor], config: AdapterConfig) -> Tensor:
        V = W + super().delta(W, start, tensors, config)
        factor = tensors[_M][start : start + len(W)].float() / row_lengths(V)
        return V.mul_(factor[:, None]).sub_(W)


METHOD = Dora()
