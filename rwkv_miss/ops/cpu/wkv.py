"""WKV-6 and WKV-7 on the CPU: the forward operators and the backward kernels of wkv6.cpp and wkv7.cpp."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from rwkv_miss.ops.cpu import kernel
from rwkv_miss.ops.wkv_operators import WKV6, WKV7, WkvOp, register

# Steps between the states that the forward keeps for the backward: as in common.h.
SAVE_EVERY = 32
_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


@cache
def source(op: str) -> Path:
    """The C++ file of "wkv6" or "wkv7"."""
    return Path(__file__).with_name(f"{op}.cpp")


def unusable(op: str, device: torch.device, dtype: torch.dtype, n: int) -> str | None:
    """Why "wkv6" or "wkv7" cannot take tensors of that device and dtype here, or None if it can; it takes any head
    size. Compiles at the first use."""
    if device.type != "cpu":
        return f"the tensors are on {device.type}"
    if dtype not in _DTYPES:
        return f"the tensors are {dtype}, it takes float32 and bfloat16"
    return kernel.operators_or_reason(source(op))


def _backward(
    op: WkvOp,
    inputs: Sequence[Tensor],
    seq_start: Tensor | None,
    saved: Sequence[Tensor],
    grad_y: Tensor | None,
    grad_state: Tensor | None,
    grads: Sequence[Tensor],
) -> None:
    """Fills the gradients; see `register`."""
    tensors = [*inputs, seq_start, *saved, grad_y, grad_state, *grads]
    # What is to be filled is contiguous already, so that only inputs are copied.
    ready = [None if x is None else x.contiguous() for x in tensors]
    v = inputs[op.v]
    function = f"{op.name}_backward_{_DTYPES[v.dtype]}"
    kernel.call(source(op.name), function, [*ready, *v.shape, SAVE_EVERY, torch.get_num_threads()])


# (*inputs, state, seq_start) -> (y, the last state), as in `rwkv_miss.ops`, with arguments that were checked.
wkv6 = register(WKV6, "cpu", SAVE_EVERY, None, _backward)
wkv7 = register(WKV7, "cpu", SAVE_EVERY, None, _backward)
