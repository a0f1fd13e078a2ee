"""The WKV-7 op: checks its arguments and hands them to a backend."""

from __future__ import annotations

import operator

import torch
from torch import Tensor

from rwkv_miss.config import BACKENDS
from rwkv_miss.errors import UserError
from rwkv_miss.ops.arguments import announce, check, state_dtype
from rwkv_miss.ops.cpu import wkv7 as on_cpu
from rwkv_miss.ops.cuda import wkv7 as on_cuda
from rwkv_miss.ops.wkv7_reference import wkv7_reference
from rwkv_miss.ops.wkv7_torch import wkv7_torch

_FUNCTIONS = {
    "reference": wkv7_reference,
    "torch": wkv7_torch,
    "cpu": on_cpu.wkv7_cpu,
    "cuda": on_cuda.wkv7_cuda,
}


def wkv7(
    r: Tensor,
    z: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor | None = None,
    seq_start: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The RWKV-7 recurrence (arXiv 2503.14456), per head, with a state S of shape (N_value, N_key):

        S = 0 where seq_start;  S = S diag(d) + (S a) b^T + v k^T;  y = S r,   d = exp(-e^-0.5 sigmoid(z))

    Args:
        r, z, k, v, a, b: (B, T, H, N), one dtype: float32, bfloat16 or (reference and torch only) float64. T may
            be 0. In RWKV-7, a = -kk and b = kk * in-context rate.
        state: (B, H, N_value, N_key), float32 (float64 with float64 inputs); None is zeros.
        seq_start: bool (B, T), True where a document begins: the state starts afresh there. None: nowhere.
        backend: one of `BACKENDS`. "auto" takes "cuda" for CUDA tensors and "cpu" for others where that works, and
            "torch" otherwise, and logs once which. "cuda" takes head sizes N of 8, 16, 24, 32, 64, 96 and 128.

    Returns:
        y (B, T, H, N) in v's dtype, and the state after the last step, a new tensor. Both are differentiable
        with respect to r, z, k, v, a, b and state.

    Raises:
        UserError: an argument of the wrong shape, dtype or device, or a backend that cannot be used here.
    """
    if backend not in BACKENDS:
        raise UserError(f"wkv7: backend is {backend!r}; choose one of {', '.join(BACKENDS)}")
    check("wkv7", v, {"r": r, "z": z, "k": k, "a": a, "b": b}, None, state, seq_start)
    kind = v.device, v.dtype, operator.index(v.shape[-1])  # index: a constant under torch.compile(dynamic=True)
    if backend == "auto":
        backend = _choose(*kind)
    elif reason := _unusable(backend, *kind):
        raise UserError(f"wkv7: backend {backend!r} cannot be used: {reason}; use backend 'torch' or 'auto'")
    if state is None:
        batch, _, n_head, n = v.shape
        state = v.new_zeros((batch, n_head, n, n), dtype=state_dtype(v))
    y, last = _FUNCTIONS[backend](r, z, k, v, a, b, state, seq_start)
    return y, last.clone() if last is state else last


@torch.compiler.assume_constant_result
def _unusable(backend: str, device: torch.device, dtype: torch.dtype, n: int) -> str | None:
    if backend == "cpu":
        return on_cpu.unusable(device.type, dtype)
    if backend == "cuda":
        return on_cuda.unusable(device, dtype, n)
    return None


@torch.compiler.assume_constant_result
def _choose(device: torch.device, dtype: torch.dtype, n: int) -> str:
    native = "cuda" if device.type == "cuda" else "cpu"
    reason = _unusable(native, device, dtype, n)
    backend = "torch" if reason else native
    announce("wkv7", backend, native, reason)
    return backend
