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
from rwkv_miss.ops import fla
from rwkv_miss.ops.arguments import state_dtype
from rwkv_miss.ops.cpu import kernels as on_cpu
from rwkv_miss.ops.cuda import kernels as on_cuda

# What "auto" tries on a type of device, in order, before "torch".
NATIVE = {"cuda": ("cuda", "fla"), "xpu": ("fla",), "cpu": ("cpu",)}
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
    else:
        check_usable(op, backend, *kind)
    if state is None:
        state = v.new_zeros((batch, n_head, n, n), dtype=state_dtype(v))
    y, last = functions[backend](*inputs, state, seq_start)
    return y, last.clone() if last is state else last


def check_usable(op: str, backend: str, device: torch.device, dtype: torch.dtype, n: int) -> None:
    """UserError where `unusable` says why not; "auto" can always be used."""
    if reason := unusable(op, backend, device, dtype, n):
        raise UserError(f"{op}: backend {backend!r} cannot be used: {reason}; use backend 'torch' or 'auto'")


@torch.compiler.assume_constant_result
def unusable(op: str, backend: str, device: torch.device, dtype: torch.dtype, n: int) -> str | None:
    """Why a backend cannot take tensors of that device, dtype and head size here, or None if it can."""
    if backend == "cpu":
        return on_cpu.unusable(op, device.type, dtype)
    if backend == "cuda":
        return on_cuda.unusable(op, device, dtype, n)
    if backend == "fla":
        return fla.unusable(device, dtype, n)
    return None


@torch.compiler.assume_constant_result
def choose(op: str, device: torch.device, dtype: torch.dtype, n: int) -> str:
    """The backend that "auto" takes: the first native one of the device that works, or "torch"; says once which, and
    why not those before it."""
    reasons = []
    for backend in NATIVE.get(device.type, ()):
        if not (reason := unusable(op, backend, device, dtype, n)):
            break
        reasons.append(f"not {backend!r}: {reason}")
    else:
        backend = "torch"
    announce(op, backend, "; ".join(reasons))
    return backend


@cache
def announce(op: str, backend: str, reasons: str) -> None:
    """Logs once which backend `auto` took, and why not the others: a warning where it is the slow one."""
    level = logging.WARNING if backend == "torch" else logging.INFO
    _log.log(level, "%s: using backend %r%s", op, backend, f"; {reasons}" if reasons else "")
