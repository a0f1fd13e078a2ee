"""Which backend computes a WKV op, and its call."""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from rwkv_miss.config import BACKENDS
from rwkv_miss.errors import UserError
from rwkv_miss.ops import fla
from rwkv_miss.ops.arguments import state_dtype
from rwkv_miss.ops.cpu import wkv as cpu
from rwkv_miss.ops.cuda import wkv as cuda
from rwkv_miss.ops.wkv6_reference import wkv6_reference
from rwkv_miss.ops.wkv6_torch import wkv6_torch
from rwkv_miss.ops.wkv7_reference import wkv7_reference
from rwkv_miss.ops.wkv7_torch import wkv7_torch


def _always_usable(op: str, device: torch.device, dtype: torch.dtype, n: int) -> None:
    return None


@dataclass(frozen=True)
class Backend:
    """One way to compute the WKV ops.

    Args:
        functions: by the op's name, (*inputs, state, seq_start) -> (y, the last state) for arguments that were
            checked and that `unusable` does not refuse; seq_start may be None.
        unusable: (op, device, dtype, head size) -> why it cannot take such tensors on this machine, or None if it can.
            It compiles, loads and imports what is needed to know.
        kernel_taken: the same arguments -> which of its kernels it takes, in words; None where it has no choice.
    """

    functions: Mapping[str, Callable[..., tuple[Tensor, Tensor]]]
    unusable: Callable[[str, torch.device, torch.dtype, int], str | None] = _always_usable
    kernel_taken: Callable[[str, torch.device, torch.dtype, int], str] | None = None


# By the names of `config.BACKENDS`, which has "auto" besides.
IMPLEMENTATIONS = {
    "reference": Backend({"wkv6": wkv6_reference, "wkv7": wkv7_reference}),
    "torch": Backend({"wkv6": wkv6_torch, "wkv7": wkv7_torch}),
    "cpu": Backend({"wkv6": cpu.wkv6, "wkv7": cpu.wkv7}, cpu.unusable),
    "cuda": Backend({"wkv6": cuda.wkv6, "wkv7": cuda.wkv7}, cuda.unusable, cuda.kernel_taken),
    "cuda_scalar": Backend({"wkv6": cuda.wkv6, "wkv7": cuda.wkv7_scalar}, cuda.scalar_unusable),
    "fla": Backend({"wkv6": fla.wkv6, "wkv7": fla.wkv7}, fla.unusable),
}
# What "auto" tries for each type of device, in this order, before it takes "torch".
NATIVE = {"cuda": ("cuda", "fla"), "xpu": ("fla",), "cpu": ("cpu",)}
_log = logging.getLogger("rwkv_miss")


def dispatch(
    op: str,
    backend: str,
    inputs: tuple[Tensor, ...],
    v: Tensor,
    state: Tensor | None,
    seq_start: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Computes an op by a backend, or by the one that "auto" takes here.

    Args:
        op: "wkv6" or "wkv7".
        inputs, state, seq_start: the op's arguments, checked; v is one of the inputs, (B, T, H, N).

    Returns:
        y (B, T, H, N), and the state after the last step in memory of its own.

    Raises:
        UserError: there is no such backend, or it cannot be used here.
    """
    batch, _, n_head, n = v.shape
    kind = v.device, v.dtype, operator.index(n)  # index: a constant under torch.compile(dynamic=True)
    check_usable(op, backend, *kind)
    if backend == "auto":
        backend = choose(op, *kind)
    if state is None:
        state = v.new_zeros((batch, n_head, n, n), dtype=state_dtype(v))
    y, last = IMPLEMENTATIONS[backend].functions[op](*inputs, state, seq_start)
    return y, last.clone() if last is state else last


def check_usable(op: str, backend: str, device: torch.device, dtype: torch.dtype, n: int) -> None:
    """Raises UserError unless there is such a backend and it can take tensors of that device, dtype and head size."""
    if backend not in BACKENDS:
        raise UserError(f"{op}: backend is {backend!r}; choose one of {', '.join(BACKENDS)}")
    if reason := unusable(op, backend, device, dtype, n):
        raise UserError(f"{op}: backend {backend!r} cannot be used: {reason}; use backend 'torch' or 'auto'")


@torch.compiler.assume_constant_result
def unusable(op: str, backend: str, device: torch.device, dtype: torch.dtype, n: int) -> str | None:
    """Why a backend cannot take tensors of that device, dtype and head size here, or None if it can. None for "auto",
    which always finds one, and on the meta device, where nothing is computed."""
    if backend == "auto" or device.type == "meta":
        return None
    return IMPLEMENTATIONS[backend].unusable(op, device, dtype, n)


@torch.compiler.assume_constant_result
def choose(op: str, device: torch.device, dtype: torch.dtype, n: int) -> str:
    """The backend that "auto" takes: the first native one of the device that can be used, or "torch". Which it is, and
    why not those before it, is logged once."""
    reasons = []
    for backend in NATIVE.get(device.type, ()):
        if not (reason := unusable(op, backend, device, dtype, n)):
            break
        reasons.append(f"not {backend!r}: {reason}")
    else:
        backend = "torch"
    if kernel_taken := IMPLEMENTATIONS[backend].kernel_taken:
        reasons.append(kernel_taken(op, device, dtype, n))
    announce(op, backend, "; ".join(reasons))
    return backend


@cache
def announce(op: str, backend: str, reasons: str) -> None:
    """Logs, once for the same arguments, which backend "auto" took, why not others, and which of its kernels: as a
    warning where it is "torch", the slow one."""
    level = logging.WARNING if backend == "torch" else logging.INFO
    _log.log(level, "%s: using backend %r%s", op, backend, f"; {reasons}" if reasons else "")
