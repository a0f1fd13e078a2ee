"""What the models compute between matrix products, as operators of torch.library: one for each operation and one for
its gradients, with their fake parts (shapes alone)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rwkv_miss.ops.library import LIBRARY, define

# The most outputs of `token_mix`.
MAX_MIXES = 6


@dataclass(frozen=True, eq=False)
class FusedOp:
    """An operation, and what its kernels on any device are given.

    Args:
        name: of the operation. Its kernels are `{name}_forward` and `{name}_backward`.
        schema: its arguments in torch.library's words. The kernels' parameters begin with them.
        outputs: the names of its outputs.
        like: (*arguments) -> for each output an argument that has its shape, or None if there is no such output.
        sizes: (*arguments) -> the sizes that the kernels are given, by name.
        parameters: the arguments whose gradients are sums over all tokens.
    """

    name: str
    schema: str
    outputs: tuple[str, ...]
    like: Callable[..., Sequence[Tensor | None]]
    sizes: Callable[..., dict[str, int]]
    parameters: tuple[str, ...] = ()

    @cached_property
    def arguments(self) -> tuple[str, ...]:
        return tuple(argument.split()[-1] for argument in self.schema.split(", "))

    @cached_property
    def tensors(self) -> tuple[str, ...]:
        """The arguments that are tensors: all but eps, which is the last."""
        return tuple(name for name in self.arguments if name != "eps")


def _heads(y: Tensor) -> dict[str, int]:
    batch, n_steps, n_head, n = y.shape
    return {"rows": batch * n_steps, "heads": n_head, "n": n}


def _mixes(x: Tensor, last: Tensor, seq_start: Tensor | None, mixes: Tensor, *_: Any) -> dict[str, int]:
    batch, n_steps, n_embd = x.shape
    return {"batch": batch, "steps": n_steps, "channels": n_embd, "n_mixes": len(mixes)}


TOKEN_MIX = FusedOp(
    "token_mix",
    "Tensor x, Tensor last, Tensor? seq_start, Tensor mixes, Tensor? extra",
    tuple(f"out{i}" for i in range(MAX_MIXES)),
    lambda x, last, seq_start, mixes, extra: [x if i < len(mixes) else None for i in range(MAX_MIXES)],
    _mixes,
    ("mixes",),
)
WKV7_ARGUMENTS = FusedOp(
    "wkv7_arguments",
    "Tensor k, Tensor? v, Tensor? v_first, Tensor a, Tensor? nu, Tensor k_k, Tensor k_a",
    ("k_out", "v_out", "minus_kk", "kk_rate"),
    lambda k, v, v_first, a, nu, k_k, k_a: [k, v, k, k],
    lambda k, *_: _heads(k),
    ("k_k", "k_a"),
)
WKV7_OUTPUT = FusedOp(
    "wkv7_output",
    "Tensor y, Tensor r, Tensor k, Tensor v, Tensor g, Tensor weight, Tensor bias, Tensor r_k, float eps",
    ("out",),
    lambda y, r, k, v, g, *_: [g],
    lambda y, *_: _heads(y),
    ("weight", "bias", "r_k"),
)
RELU_SQUARED = FusedOp("relu_squared", "Tensor x", ("out",), lambda x: [x], lambda x: {"count": x.numel()})
WKV6_OUTPUT = FusedOp(
    "wkv6_output",
    "Tensor y, Tensor g, Tensor weight, Tensor bias, float eps",
    ("out",),
    lambda y, g, *_: [g],
    lambda y, *_: _heads(y),
    ("weight", "bias"),
)
GATED = FusedOp("gated", "Tensor gate, Tensor x", ("out",), lambda gate, x: [x], lambda gate, x: {"count": x.numel()})
OPS = (TOKEN_MIX, WKV7_ARGUMENTS, WKV7_OUTPUT, RELU_SQUARED, WKV6_OUTPUT, GATED)


class Launch(Protocol):
    """Runs a kernel.

    Args:
        kernel: its name, `{op.name}_forward` or `{op.name}_backward`.
        arguments: by the names of the kernel's parameters and in their order; tensors that are to be filled are
            contiguous, others may not be. A tensor that is None is not there, or not asked for.

            forward: the op's arguments, its outputs, `op.sizes`.
            backward: the op's arguments, the outputs' gradients (`d{output}`), the arguments' gradients (`d{argument}`,
            of tensors but seq_start), `op.sizes`, `part_rows`. The gradient of one of `op.parameters` is filled in
            parts: for each `part_rows` tokens of all B T the sum over them, (parts, *its shape) in float32.
    """

    def __call__(self, kernel: str, arguments: Mapping[str, Tensor | int | float | None]) -> None: ...


@dataclass(frozen=True)
class Kernels:
    """The kernels of one type of device.

    Args:
        unusable: (op, device, dtype, width) -> why they cannot be used for such tensors here, or None if they can.
            width: the last size of the op's first argument, which is the head size where it has heads.
        launch: see `Launch`.
        part_rows: tokens whose gradients of parameters a kernel sums.
        makes_forward: whether `unusable`, where it returns None, has made the forward operators itself. `launch` then
            gets backward kernels alone.
    """

    unusable: Callable[[FusedOp, torch.device, torch.dtype, int], str | None]
    launch: Launch
    part_rows: int
    makes_forward: bool = False


def register(op: FusedOp, kernels: Mapping[str, Kernels]) -> Callable[..., Sequence[Tensor]]:
    """Makes the operators `rwkv_miss::{op.name}` and `rwkv_miss::{op.name}_backward`.

    Args:
        kernels: by type of device; read at each call.

    Returns:
        The differentiable op: its arguments -> the outputs that are there.
    """

    def backward(*given: Any) -> list[Tensor]:
        *arguments, grads, needs = given
        x, own = arguments[0], kernels[arguments[0].device.type]
        left, like = iter(grads), op.like(*arguments)
        named = dict(zip(op.arguments, arguments, strict=True))
        named |= {f"d{name}": None if y is None else next(left) for name, y in zip(op.outputs, like, strict=True)}
        made = {
            name: _empty(y) if needed else None
            for name, y, needed in zip(op.tensors, arguments, needs, strict=False)
            if name != "seq_start"
        }
        # Gradients of parameters are made in parts and summed.
        n_parts = -(-x.shape[:2].numel() // own.part_rows)
        parts = {
            name: y.new_empty((n_parts, *y.shape), dtype=torch.float32)
            for name, y in made.items()
            if y is not None and name in op.parameters
        }
        named |= {f"d{name}": y for name, y in (made | parts).items()}
        own.launch(f"{op.name}_backward", named | op.sizes(*arguments) | {"part_rows": own.part_rows})
        return _there([parts[name].sum(0).to(x.dtype) if name in parts else y for name, y in made.items()])

    def fake_backward(*given: Any) -> list[Tensor]:
        *arguments, _, needs = given
        return [_empty(x) for x, needed in zip(arguments, needs, strict=False) if needed]

    for name, schema, run, fake in (
        (op.name, op.schema, partial(launch_forward, op, kernels), lambda *x: _there(_outputs(op, *x))),
        (f"{op.name}_backward", f"{op.schema}, Tensor[] grads, bool[] needs", backward, fake_backward),
    ):
        if not define(name, f"({schema}) -> Tensor[]", fake):
            continue
        for device_type, own in kernels.items():
            if name != op.name or not own.makes_forward:
                LIBRARY.impl(name, run, device_type.upper())
    forward_op, backward_op = (getattr(torch.ops.rwkv_miss, f"{op.name}{x}").default for x in ("", "_backward"))

    class Differentiable(torch.autograd.Function):
        """Saves the arguments, which are alive anyway, and nothing else."""

        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
            ctx.save_for_backward(*arguments[: len(op.tensors)])
            ctx.rest = arguments[len(op.tensors) :]
            return tuple(forward_op(*arguments))

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
            needs = list(ctx.needs_input_grad)
            found = iter(backward_op(*ctx.saved_tensors, *ctx.rest, grads, needs))
            return tuple(next(found) if needed else None for needed in needs)

    def call(*arguments: Any) -> Sequence[Tensor]:
        if torch.is_grad_enabled() and any(x.requires_grad for x in arguments if isinstance(x, Tensor)):
            return Differentiable.apply(*arguments)
        return forward_op(*arguments)

    return call


def launch_forward(op: FusedOp, kernels: Mapping[str, Kernels], *arguments: Any) -> list[Tensor]:
    """The outputs that are there, filled by a kernel of the device of `arguments`."""
    made = _outputs(op, *arguments)
    named = dict(zip((*op.arguments, *op.outputs), (*arguments, *made), strict=True))
    kernels[arguments[0].device.type].launch(f"{op.name}_forward", named | op.sizes(*arguments))
    return _there(made)


def _outputs(op: FusedOp, *arguments: Any) -> list[Tensor | None]:
    return [None if x is None else _empty(x) for x in op.like(*arguments)]


def _empty(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _there(tensors: Iterable[Tensor | None]) -> list[Tensor]:
    return [x for x in tensors if x is not None]
