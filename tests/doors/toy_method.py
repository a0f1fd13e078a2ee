"""A method, added as CONTRIBUTING.md describes: the outputs of a linear are scaled, y = (1 + gain s) W x, s trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rwkv_miss.adapters.method import Entry, Group, LinearMethod, option
from rwkv_miss.config import AdapterConfig, TrainConfig
from rwkv_miss.errors import UserError
from rwkv_miss.model.base import RWKV
from rwkv_miss.model.linear import FrozenLinear


class ScaledLinear(nn.Module):
    def __init__(self, linear: FrozenLinear, gain: float) -> None:
        super().__init__()
        self.base_layer, self.gain = linear, gain
        self.toy_scale = nn.Parameter(torch.zeros(linear.out_features))

    def forward(self, x: Tensor) -> Tensor:
        y = self.base_layer(x)
        return y + y * (self.gain * self.toy_scale).to(y.dtype)


class Scale(LinearMethod):
    names = ("toy_scale",)
    peft_type = "TOY"

    def wrap(self, linear: FrozenLinear, config: AdapterConfig) -> nn.Module:
        return ScaledLinear(linear, option(config, "gain"))

    def shapes(self, in_features: int, out_features: int, config: AdapterConfig) -> dict[str, tuple[int, ...]]:
        return {"toy_scale": (out_features,)}

    def delta(self, W: Tensor, start: int, tensors: Mapping[str, Tensor], config: AdapterConfig) -> Tensor:
        return option(config, "gain") * tensors["toy_scale"].float()[start : start + len(W), None] * W

    def to_peft(self, config: AdapterConfig) -> dict[str, Any]:
        return {"toy_gain": option(config, "gain")}

    def from_peft(self, fields: Mapping[str, Any], file: str) -> dict[str, Any]:
        if not isinstance(fields.get("toy_gain"), float):
            raise UserError(f"{file}: toy_gain is {fields.get('toy_gain')!r}; expected a number")
        return {"options": {"gain": fields["toy_gain"]}}

    def group(self, key: str, parameter: nn.Parameter, kind: type[RWKV], config: TrainConfig) -> Group:
        return Group("toy", 3 * config.lr, 0.0)


METHOD = Scale()
# The line of the table METHODS.
ENTRY = Entry("tests.doors.toy_method", ("target_modules", "modules_to_save"), {"gain": 1.0})
