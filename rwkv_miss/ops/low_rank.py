"""The models' own low-rank products."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rwkv_miss.ops.library import define
from rwkv_miss.ops.products import multiplies_in_cpp

_ACTIVATIONS = {"none": lambda h: h, "tanh": torch.tanh, "sigmoid": torch.sigmoid}
_NAMES = list(_ACTIVATIONS)

define(
    "low_rank",
    "(Tensor[] x, Tensor[] first, Tensor[] second, Tensor?[] bias, int[] activation) -> Tensor[]",
    lambda x, first, second, bias, activation: [y @ a @ b for y, a, b in zip(x, first, second, strict=True)],
)


class LowRank(NamedTuple):
    """activation(x first) second + bias, of (B, T, C), (C, r), (r, n) and (1, 1, n); bias may be None. `activation` is
    "none", "tanh" or "sigmoid"."""

    x: Tensor
    first: Tensor
    second: Tensor
    bias: Tensor | None
    activation: str


def low_rank(parts: Sequence[LowRank]) -> list[Tensor]:
    """The value (B, T, n) of each of `parts`. One token on a CPU, without gradients, is a single pass over all of their
    matrices, whose time is otherwise spent between the products."""
    x = parts[0].x
    if x.shape[:2] == (1, 1) and multiplies_in_cpp(x):
        *tensors, activations = zip(*parts, strict=True)
        return torch.ops.rwkv_miss.low_rank.default(*tensors, [_NAMES.index(name) for name in activations])
    return [_value(*part) for part in parts]


def _value(x: Tensor, first: Tensor, second: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    h = _ACTIVATIONS[activation](x @ first)
    if bias is None:
        return h @ second
    return torch.addmm(bias[0], h.flatten(0, 1), second).view(*h.shape[:2], -1)
