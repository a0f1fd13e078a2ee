"""Parameters of the base that are trained themselves: all of them, or some beside an adapter. Names are the keys of
the checkpoint."""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

_GROUPS = {
    "ln": re.compile(r"(^|\.)ln(0|1|2|_x|_out)\.(weight|bias)$"),
    "time": re.compile(r"\.(att|ffn)\.(?!time_state)[^.]+$"),
}
"""The groups of `AdapterConfig.modules_to_save` that are not the end of a name."""


class _Cast(nn.Module):
    """The value that the forward pass uses."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        return x.to(self.dtype)


def matches(key: str, name: str) -> bool:
    """Whether `name` of `modules_to_save` means the parameter `key`: its group, or the end of its or its module's
    name."""
    if name in _GROUPS:
        return bool(_GROUPS[name].search(key))
    return any(full == name or full.endswith("." + name) for full in (key, key.rpartition(".")[0]))


def train_whole(model: nn.Module, keys: Iterable[str]) -> None:
    """Makes parameters trainable, in place, in fp32: updates of bf16 ones would be lost to rounding. The forward pass
    uses them in the base's dtype."""
    for key in keys:
        path, _, name = key.rpartition(".")
        module, value = model.get_submodule(path), model.get_parameter(key).detach()
        dtype = torch.promote_types(value.dtype, torch.float32)
        setattr(module, name, nn.Parameter(value.to(dtype)))
        if dtype != value.dtype:
            parametrize.register_parametrization(module, name, _Cast(value.dtype), unsafe=True)


def checkpoint_key(name: str) -> str:
    """The checkpoint's key of a parameter's name in the model, which is another where `train_whole` casts."""
    return re.sub(r"parametrizations\.(\w+)\.original$", r"\1", name)


def whole_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What `train_whole` made, by key, in the model's order."""
    return {
        checkpoint_key(name): p
        for name, p in model.named_parameters()
        if p.requires_grad and not name.endswith(".miss_block")
    }
