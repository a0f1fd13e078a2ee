"""How fp32 values become values of a coarser dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from rwkv_miss.config import Rounding


def round_into(out: Tensor, x: Tensor, rounding: Rounding, rng: torch.Generator) -> None:
    """Writes x, fp32, to `out`, of the same shape.

    Args:
        rounding: nearest, whose error is the smallest of each value; or stochastic, for bf16 alone: up or down with the
            probability that makes the mean of the results x. Changes far below the distance between two values are
            then kept in the mean of many weights, where nearest loses them all.
        rng: what stochastic rounding draws from.
    """
    if rounding == "nearest" or out.dtype != torch.bfloat16:
        out.copy_(x)
        return
    # bf16 is the upper half of fp32. What is added to the lower half carries over with the probability that it says.
    noise = torch.randint(2**16, x.shape, dtype=torch.int32, generator=rng)
    noise += x.contiguous().view(torch.int32)
    out.copy_((noise & -(2**16)).view(torch.float32))
