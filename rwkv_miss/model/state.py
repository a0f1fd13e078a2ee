"""The recurrent state of a model: what one piece of a sequence leaves for the next."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rwkv_miss.checkpoint import write_safetensors
from rwkv_miss.config import ModelConfig
from rwkv_miss.errors import UserError
from rwkv_miss.files import atomic_write, check_is_file

_TENSORS = ("att_shift", "wkv", "ffn_shift")
_VERSION = "rwkv_version"


@dataclass
class State:
    """L layers, B sequences, C = n_embd, H heads of N.

    att_shift: (L, B, C) the last token's input of each time mix, in the model's dtype.
    wkv: (L, B, H, N_value, N_key) in RWKV-7, (L, B, H, N_key, N_value) in RWKV-6; fp32 (float64 in a float64 model).
    ffn_shift: (L, B, C) the last token's input of each channel mix.
    version: of the model that made it (`ModelConfig.version`).
    """

    att_shift: Tensor
    wkv: Tensor
    ffn_shift: Tensor
    version: int | str

    def layers(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        return list(zip(self.att_shift, self.wkv, self.ffn_shift, strict=True))

    def map(self, function: Callable[[Tensor], Tensor]) -> State:
        """Applies `function` to each tensor, such as `lambda x: x[:, :1]` to keep the first sequence alone."""
        return State(function(self.att_shift), function(self.wkv), function(self.ffn_shift), self.version)

    @classmethod
    def cat(cls, states: Sequence[State]) -> State:
        """The sequences of all `states`, one after the other, as one batch."""
        att_shift, wkv, ffn_shift = (torch.cat([getattr(x, name) for x in states], dim=1) for name in _TENSORS)
        return cls(att_shift, wkv, ffn_shift, states[0].version)

    def detach(self) -> State:
        """No gradient flows back through the result."""
        return self.map(Tensor.detach)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> State:
        """The state for a model on that device and of that dtype; `wkv` is fp32, or float64 for a float64 model."""
        wide = None if dtype is None else torch.promote_types(dtype, torch.float32)
        return State(
            self.att_shift.to(device, dtype), self.wkv.to(device, wide), self.ffn_shift.to(device, dtype), self.version
        )

    def save(self, path: str | os.PathLike, facts: Mapping[str, str] | None = None) -> None:
        """Writes a .safetensors file, with facts that `state_facts` reads. Raises UserError if it cannot be written."""
        tensors = {name: getattr(self, name).detach().cpu().contiguous() for name in _TENSORS}
        with atomic_write(path) as part:
            write_safetensors(part, tensors, {**(facts or {}), _VERSION: str(self.version)})

    @classmethod
    def load(cls, path: str | os.PathLike) -> State:
        """Loads what `save` wrote to the CPU. Raises UserError if the file is missing, damaged or of another kind."""
        with _opened(path) as file:
            version = (file.metadata() or {}).get(_VERSION, "")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
        if set(tensors) != set(_TENSORS) or not version:
            raise UserError(
                f"{path}: holds {', '.join(sorted(tensors)[:5]) or 'nothing'} of RWKV version {version or 'unknown'}; "
                f"expected a state that State.save wrote: {', '.join(_TENSORS)}"
            )
        return cls(**tensors, version=int(version) if version.isdigit() else version)

    def check(self, config: ModelConfig, batch: int, like: Tensor) -> None:
        """UserError unless this is a state of `batch` sequences for a model of `config` with activations as `like`."""
        if self.version != config.version:
            raise UserError(f"the state is of RWKV-{self.version}; the model is an RWKV-{config.version}")
        shift = (config.n_layer, batch, config.n_embd), like.dtype
        wkv = (config.n_layer, batch, config.n_head, config.head_size, config.head_size)
        wanted = {"att_shift": shift, "wkv": (wkv, torch.promote_types(like.dtype, torch.float32)), "ffn_shift": shift}
        for name, (shape, dtype) in wanted.items():
            x = getattr(self, name)
            if tuple(x.shape) != shape or x.dtype != dtype or x.device != like.device:
                raise UserError(
                    f"state.{name} is {tuple(x.shape)} {x.dtype} on {x.device}; the model and its tokens need {shape} "
                    f"{dtype} on {like.device} (layers, sequences, ...; state.to(...) changes dtype and device)"
                )


def state_facts(path: str | os.PathLike) -> dict[str, str]:
    """What was written beside the tensors of a file of `State.save`. Raises UserError as `State.load`."""
    with _opened(path) as file:
        return file.metadata() or {}


@contextmanager
def _opened(path: str | os.PathLike) -> Iterator[Any]:
    check_is_file(Path(path), "state")
    try:
        with safe_open(path, "pt") as file:
            yield file
    except SafetensorError as e:
        raise UserError(f"{path}: not a readable safetensors file ({e}); is it truncated?") from None
