"""The definition of the WKV-7 op: a plain loop over time, which autograd differentiates."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# A step's decay is exp(-DECAY_SCALE sigmoid(z)): from 1 down to exp(-e^-0.5) = 0.545 (RWKV-7, arXiv 2503.14456).
DECAY_SCALE = math.exp(-0.5)


def wkv7_reference(
    r: Tensor, z: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor, seq_start: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`rwkv_miss.ops.wkv7` for arguments that were checked, with a state; computes in the dtype of `state`."""
    out_dtype = v.dtype
    r, z, k, v, a, b = (x.to(state.dtype) for x in (r, z, k, v, a, b))
    d = torch.exp(-DECAY_SCALE * torch.sigmoid(z))
    y = []
    for t in range(v.shape[1]):
        if seq_start is not None:
            state = state.masked_fill(seq_start[:, t, None, None, None], 0.0)
        removed = (state @ a[:, t, :, :, None]) * b[:, t, :, None, :]
        state = state * d[:, t, :, None, :] + removed + v[:, t, :, :, None] * k[:, t, :, None, :]
        y.append((state @ r[:, t, :, :, None]).squeeze(-1))
    return (torch.stack(y, dim=1) if y else v.clone()).to(out_dtype), state
