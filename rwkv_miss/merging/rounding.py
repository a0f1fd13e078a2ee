"""How fp32 values become values of a coarser dtype."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from rwkv_miss.config import Rounding
from rwkv_miss.ops.cpu import kernel

_SOURCE = Path(kernel.__file__).with_name("rounding.cpp")


class Squares(NamedTuple):
    """Sums of squares: of what was to be added, and of what rounding changed."""

    delta: float
    lost: float


def round_into(out: Tensor, x: Tensor, delta: Tensor, rounding: Rounding, rng: torch.Generator) -> Squares:
    """Writes x to `out`, and measures that. x and delta are fp32; all three have the same shape.

    To nearest in bf16 it is one pass in C++, where a compiler is found; otherwise PyTorch takes several.

    Args:
        delta: the part of x that rounding is compared with.
        rounding: nearest, whose error is the smallest of each value; or stochastic, for bf16 alone: up or down with the
            probability that makes the mean of the results x. Changes far below the distance between two values are
            then kept in the mean of many weights, where nearest loses them all.
        rng: what stochastic rounding draws from.
    """
    if out.dtype != torch.bfloat16 or rounding == "nearest":
        if out.dtype == torch.bfloat16 and out.is_contiguous() and kernel.library_or_reason(_SOURCE)[0] is not None:
            squares = torch.empty(2, dtype=torch.float64)
            kernel.call(_SOURCE, "round_bfloat16", [x.contiguous(), delta.contiguous(), out, squares, out.numel()])
            return Squares(*squares.tolist())
        out.copy_(x)
    else:
        # bf16 is the upper half of fp32. What is added to the lower half carries over with the probability that it says
        noise = torch.randint(2**16, x.shape, dtype=torch.int32, generator=rng)
        noise += x.contiguous().view(torch.int32)
        out.copy_((noise & -(2**16)).view(torch.float32))
    return Squares(*(torch.linalg.vector_norm(t).item() ** 2 for t in (delta, torch.sub(out, x))))
