"""Which backend computes a recurrence, and the call of it."""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Mapping
from functools import cache

import torch
from torch import Tensor

from rwkv_miss.config import BACKENDS
from rwkv_miss.errors import UserError
from rwkv_miss.ops.arguments import state_dtype
from rwkv_miss.ops.cpu import kernels as on_cpu
from rwkv_miss.ops.cuda import kernels as on_cuda

_log = logging.getLogger("rwkv_miss")


def dispatch(
    op: str,
    functions: Mapping[str, Callable[..., tuple[Tensor, Tensor]]],
    backend: str,
    inputs: tuple[Tensor, ...],
    v: Tensor,
    state: Tensor | None,
    seq_start: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Calls the backend's function, or that of the backend that "auto" takes here, on arguments that were checked.

    Raises:
        UserError: there is no such backend, or it cannot be used here.
    """
    if backend not in BACKENDS:
        raise UserError(f"{op}: backend is {backend!r}; choose one of {', '.join(BACKENDS)}")
    batch, _, n_head, n = v.shape
    kind = v.device, v.dtype, operator.index(n)  # index: a constant under torch.compile(dynamic=True)
    if backend == "auto":
        backend = choose(op, *kind)
    elif reason := unusable(op, backend, *kind):
        raise UserError(f"{op}: backend {backend!r} cannot be used: {reason}; use backend 'torch' or 'auto'")
    if state is None:
        state = v.new_zeros((batch, n_head, n, n), dtype=state_dtype(v))
    y, last = functions[backend](*inputs, state, seq_start)
    return y, last.clone() if last is state else last


@torch.compiler.assume_constant_result
def unusable(op: str, backend: str, device: torch.device, dtype: torch.dtype, n: int) -> str | None:
    """Why a backend cannot take tensors of that device, dtype and head size here, or None if it can."""
    if backend == "cpu":
        return on_cpu.unusable(op, device.type, dtype)
    if backend == "cuda":
        return on_cuda.unusable(op, device, dtype, n)
    return None


@torch.compiler.assume_constant_result
def choose(op: str, device: torch.device, dtype: torch.dtype, n: int) -> str:
    """The backend that "auto" takes: the native one of the device, or "torch"; says once which, and why."""
    native = "cuda" if device.type == "cuda" else "cpu"
    reason = unusable(op, native, device, dtype, n)
    backend = "torch" if reason else native
    announce(op, backend, native, reason)
    return backend


@cache
def announce(op: str, backend: str, native: str, reason: str | None) -> None:
    """Logs once which backend `auto` took, and why not the native one."""
    if reason:
        _log.warning("%s: using backend %r; not %r: %s", op, backend, native, reason)
    else:
        _log.info("%s: using backend %r", op, backend)
