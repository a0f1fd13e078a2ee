"""WKV-6 on the CPU: wkv6.cpp as operators of torch.library, with their fake (shapes alone) and autograd parts."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from rwkv_miss.ops.cpu.build import BuildError, load_library

SOURCE = Path(__file__).with_name("wkv6.cpp")
# Steps between the states that the forward keeps for the backward.
SAVE_EVERY = 32
_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
_INPUTS = "Tensor r, Tensor k, Tensor v, Tensor w, Tensor u"


@torch.compiler.assume_constant_result
def unusable(device_type: str, dtype: torch.dtype) -> str | None:
    """Why this backend cannot take tensors of that device and dtype, or None if it can. Compiles on first use."""
    if device_type != "cpu":
        return f"the tensors are on {device_type}"
    if dtype not in _DTYPES:
        return f"the tensors are {dtype}, it takes float32 and bfloat16"
    return _library_or_reason()[1]


def wkv6_cpu(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor, seq_start: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Arguments as in `rwkv_miss.ops.wkv6`, already checked."""
    save = torch.is_grad_enabled() and any(x.requires_grad for x in (r, k, v, w, u, state))
    y, last, _ = _forward_op(r, k, v, w, u, state, seq_start, save)
    return y, last


@cache
def _library_or_reason() -> tuple[ctypes.CDLL | None, str | None]:
    try:
        return load_library(SOURCE), None
    except (BuildError, OSError) as error:
        return None, str(error)


def forward(
    library: ctypes.CDLL, inputs: list[Tensor], state: Tensor, seq_start: Tensor | None, save: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the last state, and for the backward (empty unless `save`) a state every SAVE_EVERY steps.

    Args:
        library: wkv6.cpp, loaded.
        inputs: r, k, v, w, u.
    """
    y, last, states = _empty_outputs(inputs[2], state, save)
    _call(library, "forward", [*inputs, state, seq_start, y, last, states if save else None], inputs[2])
    return y, last, states


def backward(
    library: ctypes.CDLL,
    inputs: list[Tensor],
    seq_start: Tensor | None,
    states: Tensor,
    grad_y: Tensor | None,
    grad_state: Tensor | None,
) -> list[Tensor]:
    """The gradients of r, k, v, w, u and the first state, from the states that `forward` saved.

    Args:
        grad_y: of y, or None for zeros.
        grad_state: of the last state, likewise.
    """
    *sequences, u = inputs
    grads = [x.new_empty(x.shape) for x in sequences]
    batch, n_head, _, n, _ = states.shape
    grad_u = states.new_empty((batch, n_head, n))
    grad_first = states.new_empty((batch, n_head, n, n))
    arguments = [*inputs, seq_start, states, grad_y, grad_state, *grads, grad_u, grad_first]
    _call(library, "backward", arguments, inputs[2])
    return [*grads, grad_u.sum(0).to(u.dtype), grad_first]


def _call(library: ctypes.CDLL, name: str, tensors: list[Tensor | None], v: Tensor) -> None:
    tensors = [None if x is None else x.contiguous() for x in tensors]  # held until the call has returned
    function = getattr(library, f"wkv6_{name}_{_DTYPES[v.dtype]}")
    pointers = [ctypes.c_void_p(None if x is None else x.data_ptr()) for x in tensors]
    sizes = [ctypes.c_int64(x) for x in (*v.shape, SAVE_EVERY, torch.get_num_threads())]
    function(*pointers, *sizes)


def _empty_outputs(v: Tensor, state: Tensor, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    batch, n_steps, n_head, n = v.shape
    chunks = -(-n_steps // SAVE_EVERY)
    states = v.new_empty((batch, n_head, chunks, n, n) if save else (0,), dtype=torch.float32)
    return v.new_empty(v.shape), state.new_empty(state.shape), states


@torch.library.custom_op(
    "rwkv_miss::wkv6_cpu",
    mutates_args=(),
    device_types="cpu",
    schema=f"({_INPUTS}, Tensor state, Tensor? seq_start, bool save) -> (Tensor, Tensor, Tensor)",
)
def _forward_op(r, k, v, w, u, state, seq_start, save):
    return forward(_library_or_reason()[0], [r, k, v, w, u], state, seq_start, save)


@_forward_op.register_fake
def _(r, k, v, w, u, state, seq_start, save):
    return _empty_outputs(v, state, save)


@torch.library.custom_op(
    "rwkv_miss::wkv6_cpu_backward",
    mutates_args=(),
    device_types="cpu",
    schema=f"({_INPUTS}, Tensor? seq_start, Tensor states, Tensor? grad_y, Tensor? grad_state)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _backward_op(r, k, v, w, u, seq_start, states, grad_y, grad_state):
    return tuple(backward(_library_or_reason()[0], [r, k, v, w, u], seq_start, states, grad_y, grad_state))


@_backward_op.register_fake
def _(r, k, v, w, u, seq_start, states, grad_y, grad_state):
    batch, n_head, _, n, _ = states.shape
    return *(x.new_empty(x.shape) for x in (r, k, v, w, u)), states.new_empty((batch, n_head, n, n))


def _setup_context(ctx, inputs, output):
    *tensors, _, seq_start, _ = inputs
    ctx.save_for_backward(*tensors, seq_start, output[2])
    ctx.set_materialize_grads(False)


def _autograd_backward(ctx, grad_y, grad_state, _grad_states):
    grads = _backward_op(*ctx.saved_tensors, grad_y, grad_state)
    return *grads, None, None


_forward_op.register_autograd(_autograd_backward, setup_context=_setup_context)
