"""The definition of the WKV-6 op: a plain loop over time, which autograd differentiates."""

from __future__ import annotations

import torch
from torch import Tensor


def decay(w: Tensor) -> Tensor:
    """exp(-exp(w)), the decay of RWKV-6 (arXiv 2404.05892). From w = 7 on it and its gradient are 0 even in float64.
    The clamp changes neither; it keeps exp(w) finite, since an infinite one would make that gradient 0 * infinity."""
    return torch.exp(-torch.exp(w.clamp(max=30.0)))


def wkv6_reference(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor, seq_start: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`rwkv_miss.ops.wkv6` for arguments that were checked, with a state; computes in the dtype of `state`."""
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
