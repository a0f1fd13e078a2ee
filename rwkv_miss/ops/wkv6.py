"""The WKV-6 op: checks its arguments and hands them to a backend."""

from __future__ import annotations

import torch
from torch import Tensor

from rwkv_miss.config import BACKENDS
from rwkv_miss.errors import UserError
from rwkv_miss.ops.arguments import announce, check, state_dtype
from rwkv_miss.ops.cpu.wkv6 import unusable, wkv6_cpu
from rwkv_miss.ops.wkv6_reference import wkv6_reference
from rwkv_miss.ops.wkv6_torch import wkv6_torch

_FUNCTIONS = {"reference": wkv6_reference, "torch": wkv6_torch, "cpu": wkv6_cpu}


def wkv6(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    state: Tensor | None = None,
    seq_start: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The RWKV-6 recurrence (arXiv 2404.05892), per head, with a state S of shape (N_key, N_value):

        S = 0 where seq_start;  y = (S + diag(u) k v^T)^T r;  S = diag(d) S + k v^T,   d = exp(-exp(w))

    Args:
        r, k, v, w: (B, T, H, N), one dtype: float32, bfloat16 or (reference and torch only) float64. T may be 0.
        u: (H, N) of that dtype: the weight of the step's own key.
        state: (B, H, N_key, N_value), float32 (float64 with float64 inputs); None is zeros. (In `wkv7` the
            value comes first.)
        seq_start: bool (B, T), True where a document begins: the state starts afresh there. None: nowhere.
        backend: one of `BACKENDS`, but "cuda", which computes WKV-7 only. "auto" takes "cpu" for CPU tensors
            where that works, and "torch" otherwise, and logs once which.

    Returns:
        y (B, T, H, N) in v's dtype, and the state after the last step, a new tensor. Both are differentiable
        with respect to r, k, v, w, u and state.

    Raises:
        UserError: an argument of the wrong shape, dtype or device, or a backend that cannot be used here.
    """
    if backend not in BACKENDS:
        raise UserError(f"wkv6: backend is {backend!r}; choose one of {', '.join(BACKENDS)}")
    check("wkv6", v, {"r": r, "k": k, "w": w}, u, state, seq_start)
    if backend == "auto":
        backend = _choose(v.device.type, v.dtype)
    elif reason := _unusable(backend, v.device.type, v.dtype):
        raise UserError(f"wkv6: backend {backend!r} cannot be used: {reason}; use backend 'torch' or 'auto'")
    if state is None:
        batch, _, n_head, n = v.shape
        state = v.new_zeros((batch, n_head, n, n), dtype=state_dtype(v))
    y, last = _FUNCTIONS[backend](r, k, v, w, u, state, seq_start)
    return y, last.clone() if last is state else last


@torch.compiler.assume_constant_result
def _unusable(backend: str, device_type: str, dtype: torch.dtype) -> str | None:
    if backend == "cpu":
        return unusable(device_type, dtype)
    if backend == "cuda":
        return "it does not compute RWKV-6"
    return None


@torch.compiler.assume_constant_result
def _choose(device_type: str, dtype: torch.dtype) -> str:
    native = "cuda" if device_type == "cuda" else "cpu"
    reason = _unusable(native, device_type, dtype)
    backend = "torch" if reason else native
    announce("wkv6", backend, native, reason)
    return backend
