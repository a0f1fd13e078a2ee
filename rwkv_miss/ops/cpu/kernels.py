"""The recurrences on the CPU: wkv6.cpp and wkv7.cpp, compiled on first use, as operators of torch.library."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from rwkv_miss.ops.cpu.build import BuildError, load_library
from rwkv_miss.ops.registration import WKV6, WKV7, Recurrence, register

# Steps between the states that the forward keeps for the backward.
SAVE_EVERY = 32
_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def source(name: str) -> Path:
    return Path(__file__).with_name(f"{name}.cpp")


def unusable(name: str, device_type: str, dtype: torch.dtype) -> str | None:
    """Why the op ("wkv6" or "wkv7") cannot take tensors of that device and dtype here, or None if it can. Compiles on
    first use."""
    if device_type != "cpu":
        return f"the tensors are on {device_type}"
    if dtype not in _DTYPES:
        return f"the tensors are {dtype}, it takes float32 and bfloat16"
    return library_or_reason(name)[1]


@cache
def library_or_reason(name: str) -> tuple[ctypes.CDLL | None, str | None]:
    try:
        return load_library(source(name)), None
    except (BuildError, OSError) as error:
        return None, str(error)


def _forward(op: Recurrence, inputs, state, seq_start, y, last, saved) -> None:
    _call(op, "forward", [*inputs, state, seq_start, y, last, *saved])


def _backward(op: Recurrence, inputs, seq_start, saved, grad_y, grad_state, grads) -> None:
    _call(op, "backward", [*inputs, seq_start, *saved, grad_y, grad_state, *grads])


def _call(op: Recurrence, name: str, tensors: list[Tensor | None]) -> None:
    v = tensors[op.v]
    library, reason = library_or_reason(op.name)
    assert library is not None, reason
    function = getattr(library, f"{op.name}_{name}_{_DTYPES[v.dtype]}")
    tensors = [None if x is None else x.contiguous() for x in tensors]  # held until the call has returned
    pointers = [ctypes.c_void_p(None if x is None else x.data_ptr()) for x in tensors]
    sizes = [ctypes.c_int64(x) for x in (*v.shape, SAVE_EVERY, torch.get_num_threads())]
    function(*pointers, *sizes)


# (*inputs, state, seq_start) -> (y, the last state), as in `rwkv_miss.ops`, already checked.
wkv6 = register(WKV6, "cpu", SAVE_EVERY, _forward, _backward)
wkv7 = register(WKV7, "cpu", SAVE_EVERY, _forward, _backward)
