"""The definition of the WKV-6 op: one plain loop over time, differentiated by autograd."""

from __future__ import annotations

import torch
from torch import Tensor


def decay(w: Tensor) -> Tensor:
    """exp(-exp(w)) (RWKV-6, arXiv 2404.05892). From w = 7 on it is 0 even in float64, and so is its gradient:
    the clamp changes neither, but keeps exp(w) finite, which would make that gradient 0 * infinity."""
    return torch.exp(-torch.exp(w.clamp(max=30.0)))


def wkv6_reference(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor, seq_start: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Arguments as in `rwkv_miss.ops.wkv6`, already checked; computes in the dtype of `state`."""
    out_dtype = v.dtype
    r, k, v, w, u = (x.to(state.dtype) for x in (r, k, v, w, u))
    d = decay(w)
    y = []
    for t in range(v.shape[1]):
        if seq_start is not None:
            state = state.masked_fill(seq_start[:, t, None, None, None], 0.0)
        written = k[:, t, :, :, None] * v[:, t, :, None, :]
        y.append((r[:, t, :, None, :] @ (state + u[..., None] * written)).squeeze(-2))
        state = state * d[:, t, :, :, None] + written
    return (torch.stack(y, dim=1) if y else v.clone()).to(out_dtype), state
