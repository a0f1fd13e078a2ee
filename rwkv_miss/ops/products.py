"""Products of single rows, and of the sequences of a batch, each with a matrix of its own."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from rwkv_miss.ops.cpu import kernel
from rwkv_miss.ops.library import define

_SOURCE = Path(kernel.__file__).with_name("products.cpp")
_FUNCTIONS = {torch.float32: "add_products_f32", torch.bfloat16: "add_products_bf16"}

define("multiply_row", "(Tensor x, Tensor weight) -> Tensor", F.linear)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x weight^T, as `F.linear`. A single row on a CPU, without gradients, is multiplied by a kernel that reads the
    weight faster."""
    if x.numel() == weight.shape[1] and multiplies_in_cpp(x) and x.dtype == weight.dtype:
        return torch.ops.rwkv_miss.multiply_row.default(x, weight)
    return F.linear(x, weight)


def add_products(y: Tensor, x: Tensor, stack: Tensor, rows: Tensor, slots: Tensor) -> None:
    """y[rows[m]] += x[rows[m]] stack[slots[m]] for every m, in place.

    Args:
        y: (B, T, n), contiguous.
        x: (B, T, k).
        stack: (slots, k, n), contiguous.
        rows, slots: int64 (M); no row occurs twice. With equal slots beside each other, a matrix is read once.
    """
    if x.device.type != "cpu":
        _add_at_once(y, x, stack, rows, slots)
    elif x.shape[1] == 1 and _in_cpp(x.dtype):
        sizes = len(rows), *stack.shape[1:], torch.get_num_threads()
        kernel.call(_SOURCE, _FUNCTIONS[x.dtype], [x.contiguous(), stack, rows, slots, y, *sizes])
    else:
        _add_one_by_one(y, x, stack, rows, slots)


def _add_at_once(y: Tensor, x: Tensor, stack: Tensor, rows: Tensor, slots: Tensor) -> None:
    """In a few kernels whatever the number of rows; the matrices are copied, which on a CPU takes the longest."""
    y.index_add_(0, rows, torch.bmm(x[rows], stack[slots]))


def _add_one_by_one(y: Tensor, x: Tensor, stack: Tensor, rows: Tensor, slots: Tensor) -> None:
    for row, slot in zip(rows.tolist(), slots.tolist(), strict=True):
        y[row].addmm_(x[row], stack[slot])


def multiplies_in_cpp(x: Tensor) -> bool:
    """Whether the operators of `_SOURCE`, which have no gradients, can take x. Compiles at the first use."""
    return x.device.type == "cpu" and not torch.is_grad_enabled() and _in_cpp(x.dtype)


def _in_cpp(dtype: torch.dtype) -> bool:
    return dtype in _FUNCTIONS and kernel.operators_or_reason(_SOURCE) is None
