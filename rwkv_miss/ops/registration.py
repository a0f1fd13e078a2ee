"""The compiled kernels of a recurrence as operators of torch.library, with their fake (shapes alone) and autograd
parts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Recurrence:
    """What its kernels take and keep, on every device.

    Args:
        inputs: one letter each, in the order of the op's arguments: (B, T, H, N), but u (H, N).
        saved: what the forward keeps for the backward beside the states: (B, T, H, N), fp32.
    """

    name: str
    inputs: str
    saved: tuple[str, ...] = ()

    @property
    def v(self) -> int:
        """The place of v among the inputs: its shape has all sizes."""
        return self.inputs.index("v")


WKV6 = Recurrence("wkv6", "rkvwu")
WKV7 = Recurrence("wkv7", "rzkvab", ("saved_u",))


def register(
    op: Recurrence, device_type: str, save_every: int, forward: Callable[..., None], backward: Callable[..., None]
) -> Callable[..., tuple[Tensor, Tensor]]:
    """Makes the operators `rwkv_miss::{op.name}_{device_type}` and `.._backward`.

    Args:
        save_every: steps between the states that the forward keeps for the backward.
        forward: (op, inputs, state, seq_start, y, last, saved): fills y, the last state and `saved`: the state before
            every `save_every` steps (B, H, chunks, N, N), and what the op keeps besides; all None where no gradient
            will be asked for.
        backward: (op, inputs, seq_start, saved, grad_y, grad_state, grads): fills the gradients of the inputs and of
            the first state; that of u by batch row, (B, H, N) in fp32. grad_y and grad_state may be None: zeros.

    Returns:
        The op: (*inputs, state, seq_start) -> (y, the last state), its arguments checked before.
    """
    name = f"rwkv_miss::{op.name}_{device_type}"
    inputs = ", ".join(f"Tensor {letter}" for letter in op.inputs)
    saved = ", ".join(f"Tensor {x}" for x in ("saved_states", *op.saved))

    def outputs(*arguments) -> tuple[Tensor, ...]:
        *_, state, _seq_start, save = arguments
        v = arguments[op.v]
        batch, n_steps, n_head, n = v.shape
        kept = [(batch, n_head, -(-n_steps // save_every), n, n), *(v.shape for _ in op.saved)]
        kept = [v.new_empty(shape if save else (0,), dtype=torch.float32) for shape in kept]
        return v.new_empty(v.shape), state.new_empty(state.shape), *kept

    def run_forward(*arguments) -> tuple[Tensor, ...]:
        *tensors, state, seq_start, save = arguments
        y, last, *kept = made = outputs(*arguments)
        forward(op, tensors, state, seq_start, y, last, kept if save else [None] * len(kept))
        return made

    def gradients(*arguments) -> tuple[Tensor, ...]:
        states = arguments[len(op.inputs) + 1]
        batch, n_head, _, n, _ = states.shape
        grads = (x.new_empty(x.shape) for x in arguments[: len(op.inputs)])
        return *grads, states.new_empty((batch, n_head, n, n))

    def run_backward(*arguments) -> tuple[Tensor, ...]:
        tensors, (seq_start, *kept, grad_y, grad_state) = arguments[: len(op.inputs)], arguments[len(op.inputs) :]
        made = gradients(*arguments)
        batch = made[-1].shape[0]  # u is the same in every row
        rows = [x if x.dim() == 4 else x.new_empty((batch, *x.shape), dtype=torch.float32) for x in made]
        backward(op, tensors, seq_start, kept, grad_y, grad_state, rows)
        return tuple(x if x is row else row.sum(0).to(x.dtype) for x, row in zip(made, rows, strict=True))

    def custom_op(name: str, function: Callable, fake: Callable, takes: str, n_outputs: int):
        schema = f"({inputs}, {takes}) -> ({', '.join(['Tensor'] * n_outputs)})"
        made = torch.library.custom_op(name, function, mutates_args=(), device_types=device_type, schema=schema)
        made.register_fake(fake)
        return made

    forward_op = custom_op(name, run_forward, outputs, "Tensor state, Tensor? seq_start, bool save", 3 + len(op.saved))
    takes = f"Tensor? seq_start, {saved}, Tensor? grad_y, Tensor? grad_state"
    backward_op = custom_op(f"{name}_backward", run_backward, gradients, takes, len(op.inputs) + 1)

    def setup_context(ctx, inputs, output) -> None:
        *tensors, _state, seq_start, _save = inputs
        ctx.save_for_backward(*tensors, seq_start, *output[2:])
        ctx.set_materialize_grads(False)

    def differentiate(ctx, grad_y, grad_state, *_):
        return *backward_op(*ctx.saved_tensors, grad_y, grad_state), None, None

    forward_op.register_autograd(differentiate, setup_context=setup_context)

    def run(*arguments: Tensor | None) -> tuple[Tensor, Tensor]:
        save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in arguments)
        y, last, *_ = forward_op(*arguments, save)
        return y, last

    return run
