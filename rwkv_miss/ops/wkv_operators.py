"""Compiled WKV kernels as operators of torch.library, with their fake parts (shapes alone) and their gradients.

B is the batch, T the number of steps, H the number of heads, N the head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from rwkv_miss.ops.library import LIBRARY, define


@dataclass(frozen=True)
class WkvOp:
    """The tensors that every compiled implementation of a WKV op takes and keeps, on any device.

    Args:
        name: of the op, such as "wkv7".
        inputs: the names of the inputs, one letter each, in the order of the op's arguments. All have the shape
            (B, T, H, N), but u has (H, N).
        saved: the names of what the forward keeps for the backward beside the states, each (B, T, H, N) in float32.
        states_dtype: of the states that the forward keeps.
    """

    name: str
    inputs: str
    saved: tuple[str, ...] = ()
    states_dtype: torch.dtype = torch.float32

    @property
    def v(self) -> int:
        """The index of v among the inputs: sizes, dtype and device of a call are taken from it."""
        return self.inputs.index("v")


WKV6 = WkvOp("wkv6", "rkvwu")
WKV7 = WkvOp("wkv7", "rzkvab", ("saved_u",))
WKV7_CHUNK = WkvOp("wkv7_chunk", "rzkvab", states_dtype=torch.bfloat16)


class Forward(Protocol):
    """Computes y and the last state into tensors that are given.

    Args:
        inputs: in the order of `op.inputs`.
        state: the first state, (B, H, N, N) in float32.
        seq_start: bool (B, T), or None where no document begins.
        y: (B, T, H, N) in the dtype of v, to be filled.
        last: the last state, (B, H, N, N) in float32, to be filled.
        saved: to be filled: the state before every `save_every` steps, (B, H, ceil(T / save_every), N, N) in
            `op.states_dtype` and in the kernels' own layout, then what `op.saved` names. All are None where no gradient
            will be asked for.
    """

    def __call__(
        self,
        op: WkvOp,
        inputs: Sequence[Tensor],
        state: Tensor,
        seq_start: Tensor | None,
        y: Tensor,
        last: Tensor,
        saved: Sequence[Tensor | None],
    ) -> None: ...


class Backward(Protocol):
    """Computes the gradients of the inputs and of the first state into tensors that are given.

    Args:
        inputs, seq_start: those of the forward.
        saved: what the forward filled.
        grad_y: the gradient of y, (B, T, H, N) in the dtype of v, or None for zeros.
        grad_state: the gradient of the last state, (B, H, N, N) in float32, or None for zeros.
        grads: to be filled: the gradients of the inputs in their shapes and dtypes, but that of u for each sequence of
            the batch, (B, H, N) in float32; then the gradient of the first state, (B, H, N, N) in float32.
    """

    def __call__(
        self,
        op: WkvOp,
        inputs: Sequence[Tensor],
        seq_start: Tensor | None,
        saved: Sequence[Tensor],
        grad_y: Tensor | None,
        grad_state: Tensor | None,
        grads: Sequence[Tensor],
    ) -> None: ...


def register(
    op: WkvOp, device_type: str, save_every: int, forward: Forward | None, backward: Backward
) -> Callable[..., tuple[Tensor, Tensor]]:
    """Makes the operators `rwkv_miss::{op.name}_{device_type}` and `rwkv_miss::{op.name}_{device_type}_backward`.

    Args:
        device_type: of the tensors that the operators take, such as "cuda".
        save_every: steps between the states that the forward keeps for the backward.
        forward: None where a C++ library makes the forward operator itself.

    Returns:
        The differentiable op, (*inputs, state, seq_start) -> (y, the last state), for arguments that were checked.
    """
    name = f"rwkv_miss::{op.name}_{device_type}"
    inputs = ", ".join(f"Tensor {letter}" for letter in op.inputs)
    saved = ", ".join(f"Tensor {x}" for x in ("saved_states", *op.saved))

    def outputs(*arguments: Any) -> tuple[Tensor, ...]:
        *_, state, _seq_start, save = arguments
        v = arguments[op.v]
        batch, n_steps, n_head, n = v.shape
        shapes = [(batch, n_head, -(-n_steps // save_every), n, n), *(v.shape for _ in op.saved)]
        dtypes = [op.states_dtype, *(torch.float32 for _ in op.saved)]
        kept = [v.new_empty(x if save else (0,), dtype=y) for x, y in zip(shapes, dtypes, strict=True)]
        return v.new_empty(v.shape), state.new_empty(state.shape), *kept

    def run_forward(*arguments: Any) -> tuple[Tensor, ...]:
        assert forward is not None
        *tensors, state, seq_start, save = arguments
        y, last, *kept = made = outputs(*arguments)
        forward(op, tensors, state, seq_start, y, last, kept if save else [None] * len(kept))
        return made

    def gradients(*arguments: Any) -> tuple[Tensor, ...]:
        states = arguments[len(op.inputs) + 1]
        batch, n_head, _, n, _ = states.shape
        grads = (x.new_empty(x.shape) for x in arguments[: len(op.inputs)])
        return *grads, states.new_empty((batch, n_head, n, n), dtype=torch.float32)

    def run_backward(*arguments: Any) -> tuple[Tensor, ...]:
        tensors, (seq_start, *kept, grad_y, grad_state) = arguments[: len(op.inputs)], arguments[len(op.inputs) :]
        made = gradients(*arguments)
        batch = made[-1].shape[0]
        # u serves every sequence of the batch: its gradient is made for each and summed.
        rows = [x if x.dim() == 4 else x.new_empty((batch, *x.shape), dtype=torch.float32) for x in made]
        backward(op, tensors, seq_start, kept, grad_y, grad_state, rows)
        return tuple(x if x is row else row.sum(0).to(x.dtype) for x, row in zip(made, rows, strict=True))

    def operator(
        suffix: str, function: Callable[..., tuple[Tensor, ...]] | None, fake: Callable, takes: str, n_outputs: int
    ) -> tuple[Any, bool]:
        qualified = f"{op.name}_{device_type}{suffix}"
        is_new = define(qualified, f"({inputs}, {takes}) -> ({', '.join(['Tensor'] * n_outputs)})", fake)
        if is_new and function:  # for any device, as the tests run kernels of GPUs in an emulator
            LIBRARY.impl(qualified, function, "CompositeExplicitAutograd")
        return getattr(torch.ops.rwkv_miss, qualified).default, is_new

    takes = "Tensor state, Tensor? seq_start, bool save"
    forward_op, is_new = operator("", run_forward if forward else None, outputs, takes, 3 + len(op.saved))
    takes = f"Tensor? seq_start, {saved}, Tensor? grad_y, Tensor? grad_state"
    backward_op, _ = operator("_backward", run_backward, gradients, takes, len(op.inputs) + 1)

    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        *tensors, _state, seq_start, _save = inputs
        ctx.save_for_backward(*tensors, seq_start, *output[2:])
        ctx.set_materialize_grads(False)

    def differentiate(ctx: Any, grad_y: Tensor | None, grad_state: Tensor | None, *_: Any) -> tuple:
        return *backward_op(*ctx.saved_tensors, grad_y, grad_state), None, None

    if is_new:
        torch.library.register_autograd(name, differentiate, setup_context=setup_context, lib=LIBRARY)

    def run(*arguments: Tensor | None) -> tuple[Tensor, Tensor]:
        save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in arguments)
        y, last, *_ = forward_op(*arguments, save)
        return y, last

    return run
