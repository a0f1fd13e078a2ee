"""WKV-7 on the CPU: wkv7.cpp as operators of torch.library, with their fake (shapes alone) and autograd parts."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from rwkv_miss.ops.cpu.build import BuildError, load_library

SOURCE = Path(__file__).with_name("wkv7.cpp")
# Steps between the states that the forward keeps for the backward.
SAVE_EVERY = 32
_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
_INPUTS = "Tensor r, Tensor z, Tensor k, Tensor v, Tensor a, Tensor b"


@torch.compiler.assume_constant_result
def unusable(device_type: str, dtype: torch.dtype) -> str | None:
    """Why this backend cannot take tensors of that device and dtype, or None if it can. Compiles on first use."""
    if device_type != "cpu":
        return f"the tensors are on {device_type}"
    if dtype not in _DTYPES:
        return f"the tensors are {dtype}, it takes float32 and bfloat16"
    return _library_or_reason()[1]


def wkv7_cpu(
    r: Tensor, z: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor, seq_start: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Arguments as in `rwkv_miss.ops.wkv7`, already checked."""
    save = torch.is_grad_enabled() and any(x.requires_grad for x in (r, z, k, v, a, b, state))
    y, last, _, _ = _forward_op(r, z, k, v, a, b, state, seq_start, save)
    return y, last


@cache
def _library_or_reason() -> tuple[ctypes.CDLL | None, str | None]:
    try:
        return load_library(SOURCE), None
    except (BuildError, OSError) as error:
        return None, str(error)


def forward(
    library: ctypes.CDLL, inputs: list[Tensor], state: Tensor, seq_start: Tensor | None, save: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, the last state, and for the backward (empty unless `save`) a state every SAVE_EVERY steps and S a.

    Args:
        library: wkv7.cpp, loaded.
        inputs: r, z, k, v, a, b.
    """
    inputs = [x.contiguous() for x in inputs]
    state = state.contiguous()
    outputs = _empty_outputs(inputs[3], state, save)
    saved = outputs[2:] if save else (None, None)
    _call(library, "forward", [*inputs, state, seq_start, *outputs[:2], *saved], inputs[3])
    return outputs


def backward(
    library: ctypes.CDLL,
    inputs: list[Tensor],
    seq_start: Tensor | None,
    saved: list[Tensor],
    grad_y: Tensor | None,
    grad_state: Tensor | None,
) -> list[Tensor]:
    """The gradients of r, z, k, v, a, b and the first state, from what `forward` saved.

    Args:
        grad_y: of y, or None for zeros.
        grad_state: of the last state, likewise.
    """
    inputs = [x.contiguous() for x in inputs]
    grads = _empty_gradients(inputs, saved[0])
    _call(library, "backward", [*inputs, seq_start, *saved, grad_y, grad_state, *grads], inputs[3])
    return grads


def _call(library: ctypes.CDLL, name: str, tensors: list[Tensor | None], v: Tensor) -> None:
    tensors = [None if x is None else x.contiguous() for x in tensors]  # held until the call has returned
    function = getattr(library, f"wkv7_{name}_{_DTYPES[v.dtype]}")
    pointers = [ctypes.c_void_p(None if x is None else x.data_ptr()) for x in tensors]
    sizes = [ctypes.c_int64(x) for x in (*v.shape, SAVE_EVERY, torch.get_num_threads())]
    function(*pointers, *sizes)


def _empty_outputs(v: Tensor, state: Tensor, save: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, n_steps, n_head, n = v.shape
    chunks = -(-n_steps // SAVE_EVERY)
    states = v.new_empty((batch, n_head, chunks, n, n) if save else (0,), dtype=torch.float32)
    u = v.new_empty(v.shape if save else (0,), dtype=torch.float32)
    return v.new_empty(v.shape), state.new_empty(state.shape), states, u


def _empty_gradients(inputs: list[Tensor], states: Tensor) -> list[Tensor]:
    batch, n_head, _, n, _ = states.shape
    return [x.new_empty(x.shape) for x in inputs] + [states.new_empty((batch, n_head, n, n))]


@torch.library.custom_op(
    "rwkv_miss::wkv7_cpu",
    mutates_args=(),
    device_types="cpu",
    schema=f"({_INPUTS}, Tensor state, Tensor? seq_start, bool save) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _forward_op(r, z, k, v, a, b, state, seq_start, save):
    return forward(_library_or_reason()[0], [r, z, k, v, a, b], state, seq_start, save)


@_forward_op.register_fake
def _(r, z, k, v, a, b, state, seq_start, save):
    return _empty_outputs(v, state, save)


@torch.library.custom_op(
    "rwkv_miss::wkv7_cpu_backward",
    mutates_args=(),
    device_types="cpu",
    schema=f"({_INPUTS}, Tensor? seq_start, Tensor states, Tensor u, Tensor? grad_y, Tensor? grad_state)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _backward_op(r, z, k, v, a, b, seq_start, states, u, grad_y, grad_state):
    return tuple(backward(_library_or_reason()[0], [r, z, k, v, a, b], seq_start, [states, u], grad_y, grad_state))


@_backward_op.register_fake
def _(r, z, k, v, a, b, seq_start, states, u, grad_y, grad_state):
    return tuple(_empty_gradients([r, z, k, v, a, b], states))


def _setup_context(ctx, inputs, output):
    *tensors, _, seq_start, _ = inputs
    ctx.save_for_backward(*tensors, seq_start, *output[2:])
    ctx.set_materialize_grads(False)


def _autograd_backward(ctx, grad_y, grad_state, _grad_states, _grad_u):
    grads = _backward_op(*ctx.saved_tensors, grad_y, grad_state)
    return *grads, None, None


_forward_op.register_autograd(_autograd_backward, setup_context=_setup_context)
