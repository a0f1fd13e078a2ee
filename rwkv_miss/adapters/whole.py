"""Parameters of the base that are trained directly: all of them (method full), or some beside another method
(`AdapterConfig.modules_to_save`). Names are the keys of the checkpoint."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from rwkv_miss.adapters.method import Group, Method
from rwkv_miss.config import ModelConfig, TrainConfig
from rwkv_miss.model.base import RWKV

_GROUPS = {
    "ln": re.compile(r"(^|\.)ln(0|1|2|_x|_out)\.(weight|bias)$"),
    "time": re.compile(r"\.(att|ffn)\.(?!time_state)[^.]+$"),
}
"""The entries of `AdapterConfig.modules_to_save` that name a group, and the keys that each stands for."""


class Full(Method):
    def keys(self, sizes: ModelConfig, base: Collection[str]) -> list[str]:
        return list(base)

    def group(self, key: str, parameter: nn.Parameter, kind: type[RWKV], config: TrainConfig) -> Group:
        """As BlinkDL trains them (RWKV-LM, `configure_optimizers`; the learning rates are in `RWKV.lr_scales`): weight
        decay only on matrices whose key ends in .weight."""
        scaled = [(name, scale) for name, scale in kind.lr_scales.items() if key.endswith(f".{name}")]
        is_matrix = key.endswith(".weight") and parameter.squeeze().ndim >= 2
        decay = config.weight_decay if is_matrix else 0.0
        if not scaled:
            return Group("", config.lr, decay)
        name, scale = scaled[0]
        return Group(name.rpartition(".")[2], config.lr * scale, decay)


METHOD = Full()


class _Cast(nn.Module):
    """Casts a parameter that is kept in fp32 to the dtype that the forward pass uses."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        return x.to(self.dtype)


def matches(key: str, name: str) -> bool:
    """Whether the entry `name` of `modules_to_save` means the parameter `key`: `name` is its group, or the end of its
    name or of its module's name."""
    if name in _GROUPS:
        return bool(_GROUPS[name].search(key))
    return any(full == name or full.endswith("." + name) for full in (key, key.rpartition(".")[0]))


def train_whole(model: nn.Module, keys: Iterable[str], masters: Mapping[str, Tensor] | None = None) -> None:
    """Makes parameters trainable, in place, in fp32: updates of bf16 ones would be lost to rounding. The forward pass
    uses them in the dtype that they had.

    Args:
        masters: the values to begin from, by key, in the precision of their file; the model's own for keys that are
            not in it.
    """
    for key in keys:
        path, _, name = key.rpartition(".")
        module, value = model.get_submodule(path), model.get_parameter(key).detach()
        wide = torch.promote_types(value.dtype, torch.float32)
        setattr(module, name, nn.Parameter((masters or {}).get(key, value).to(value.device, wide)))
        if wide != value.dtype:
            parametrize.register_parametrization(module, name, _Cast(value.dtype), unsafe=True)
