"""Products of the sequences of a batch, each with a matrix of its own."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from rwkv_miss.ops.cpu import kernel

SOURCE = Path(kernel.__file__).with_name("products.cpp")
_FUNCTIONS = {torch.float32: "add_products_f32", torch.bfloat16: "add_products_bf16"}


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
    elif x.shape[1] == 1 and in_cpp(x.dtype):
        sizes = len(rows), *stack.shape[1:], torch.get_num_threads()
        kernel.call(SOURCE, _FUNCTIONS[x.dtype], [x.contiguous(), stack, rows, slots, y, *sizes])
    else:
        _add_one_by_one(y, x, stack, rows, slots)


def _add_at_once(y: Tensor, x: Tensor, stack: Tensor, rows: Tensor, slots: Tensor) -> None:
    """In a few kernels whatever the number of rows; the matrices are copied, which on a CPU takes the longest."""
    y.index_add_(0, rows, torch.bmm(x[rows], stack[slots]))


def _add_one_by_one(y: Tensor, x: Tensor, stack: Tensor, rows: Tensor, slots: Tensor) -> None:
    for row, slot in zip(rows.tolist(), slots.tolist(), strict=True):
        y[row].addmm_(x[row], stack[slot])


def in_cpp(dtype: torch.dtype) -> bool:
    """Whether the kernels of `SOURCE` can take tensors of that dtype. Compiles at the first use."""
    return dtype in _FUNCTIONS and kernel.operators_or_reason(SOURCE) is None
