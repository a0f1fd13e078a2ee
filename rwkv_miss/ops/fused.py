"""What the models compute between matrix products and recurrences: each a single pass over memory where the device has
kernels for it, which compute in float32 and round once, and PyTorch operations elsewhere.

B batch, T tokens, C channels, H heads of N with C = H N. All tensors of a call have one dtype.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

import torch
from torch import Tensor

from rwkv_miss.ops import fused_torch
from rwkv_miss.ops.cpu import fused as cpu
from rwkv_miss.ops.cuda import fused as cuda
from rwkv_miss.ops.fused_operators import (
    GATED,
    OPS,
    RELU_SQUARED,
    TOKEN_MIX,
    WKV6_OUTPUT,
    WKV7_ARGUMENTS,
    WKV7_OUTPUT,
    FusedOp,
    Kernels,
    register,
)

# By type of device.
KERNELS = {
    "cpu": Kernels(cpu.unusable, cpu.launch, cpu.PART_ROWS, makes_forward=True),
    "cuda": Kernels(cuda.unusable, cuda.launch, cuda.PART_ROWS),
}
_OPERATORS = {op: register(op, KERNELS) for op in OPS}
_log = logging.getLogger("rwkv_miss")


def token_mix(
    x: Tensor, last: Tensor, seq_start: Tensor | None, mixes: Tensor, extra: Tensor | None = None
) -> list[Tensor]:
    """Each token with some of the token before it: x + (before - x) mix for every mix.

    Args:
        x: (B, T, C).
        last: (B, C), the token before the first.
        seq_start: bool (B, T), true where a document begins: the token before it is zeros.
        mixes: (n, C), n from 1 to 6.
        extra: (n, B, T, C), what is added to the mixes for each token.

    Returns:
        n tensors (B, T, C).
    """
    return _run(TOKEN_MIX, x, last, seq_start, mixes, extra)


def wkv7_arguments(
    k: Tensor, v: Tensor, v_first: Tensor | None, a: Tensor, nu: Tensor | None, k_k: Tensor, k_a: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """RWKV-7's arguments of the recurrence (arXiv 2503.14456). With the learning rate s = sigmoid(a) and kk = k k_k,
    normalised in each head:

        k (1 + (s - 1) k_a),  v + (v_first - v) sigmoid(nu),  -kk,  kk s

    Args:
        k, v, v_first, a, nu: (B, T, H, N). v_first and nu are None in layer 0, whose v is returned as it is.
        k_k, k_a: C values, such as (1, 1, C).

    Returns:
        Four tensors (B, T, H, N).
    """
    mixed = None if v_first is None else v
    k, *changed, minus_kk, kk_rate = _run(WKV7_ARGUMENTS, k, mixed, v_first, a, nu, k_k, k_a)
    return k, changed[0] if changed else v, minus_kk, kk_rate


def wkv7_output(
    y: Tensor, r: Tensor, k: Tensor, v: Tensor, g: Tensor, weight: Tensor, bias: Tensor, r_k: Tensor, eps: float
) -> Tensor:
    """What RWKV-7 makes of the recurrence's y: (group_norm(y) + (the head's sum of r k r_k) v) g.

    Args:
        y, r, k, v: (B, T, H, N).
        g: (B, T, C).
        weight, bias: (C), of the group norm, whose groups are the heads.
        r_k: (H, N).

    Returns:
        (B, T, C).
    """
    return _run(WKV7_OUTPUT, y, r, k, v, g, weight, bias, r_k, eps)[0]


def relu_squared(x: Tensor) -> Tensor:
    """relu(x)^2, for x of any shape."""
    return _run(RELU_SQUARED, x)[0]


def wkv6_output(y: Tensor, g: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """What RWKV-6 makes of the recurrence's y: group_norm(y) silu(g). Shapes are those of `wkv7_output`."""
    return _run(WKV6_OUTPUT, y, g, weight, bias, eps)[0]


def gated(gate: Tensor, x: Tensor) -> Tensor:
    """sigmoid(gate) x, for two tensors of one shape."""
    return _run(GATED, gate, x)[0]


def _run(op: FusedOp, *arguments: Any) -> Any:
    x = arguments[0]
    if x.device.type != "meta" and _unusable(op, x.device, x.dtype, x.shape[-1]):
        return getattr(fused_torch, op.name)(*arguments)
    return _OPERATORS[op](*arguments)


@cache
def _unusable(op: FusedOp, device: torch.device, dtype: torch.dtype, width: int) -> str | None:
    """Why the kernels cannot take such tensors, or None if they can."""
    kernels = KERNELS.get(device.type)
    reason = kernels.unusable(op, device, dtype, width) if kernels else f"there are none for {device.type}"
    if reason:
        _announce(device.type, reason)
    return reason


@cache
def _announce(device_type: str, reason: str) -> None:
    """Logs, once for the same arguments, that what could be one pass is several."""
    _log.warning("between matrix products: PyTorch operations, no kernels on %s: %s", device_type, reason)
