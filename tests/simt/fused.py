"""Runs the kernels of cuda/fused.cu in the emulator, without a driver and torch's operators."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rwkv_miss.ops import fused_torch
from rwkv_miss.ops.cuda.fused import PART_ROWS, THREADS, as_argument, grid
from rwkv_miss.ops.cuda.programs import PROGRAMS
from rwkv_miss.ops.fused_operators import GATED, RELU_SQUARED, TOKEN_MIX, FusedOp
from tests.simt.harness import build_once, guarded, guarded_copy, launch

PROGRAM = PROGRAMS["fused"]
EPS = 64e-5


def load_kernels(dtype: torch.dtype) -> ctypes.CDLL:
    return build_once(PROGRAM.source, *PROGRAM.variants[dtype])


def draw(
    op: FusedOp, batch: int, n_steps: int, n_head: int, n: int, dtype: torch.dtype, without: Sequence[str] = ()
) -> list[Any]:
    """An op's arguments, those `without` None; `token_mix` has as many mixes as there are heads."""
    generator = torch.Generator().manual_seed(100 * n_steps + n)
    shapes = dict.fromkeys(op.tensors, (batch, n_steps, n_head, n))
    if op is TOKEN_MIX:
        full = (batch, n_steps, n)
        shapes = {"x": full, "last": (batch, n), "seq_start": full[:2], "mixes": (n_head, n), "extra": (n_head, *full)}
    elif op not in (RELU_SQUARED, GATED):
        shapes |= dict.fromkeys(op.parameters, (n_head * n,)) | {"r_k": (n_head, n), "g": (batch, n_steps, n_head * n)}
    arguments = [torch.randn(shapes[x], generator=generator).to(dtype) for x in op.tensors]
    named = dict(zip(op.tensors, arguments, strict=True))
    if op is TOKEN_MIX:
        named["seq_start"] = named["seq_start"] > 1
    return [None if x in without else y for x, y in named.items()] + ([EPS] if "eps" in op.arguments else [])


def differentiable(op: FusedOp, arguments: Sequence[Any]) -> list[str]:
    """The arguments that have gradients."""
    named = zip(op.arguments, arguments, strict=True)
    return [name for name, x in named if isinstance(x, Tensor) and name != "seq_start"]


def make_grads(op: FusedOp, arguments: Sequence[Any]) -> list[Tensor]:
    """A gradient for each output that is there."""
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(x.shape, generator=generator).to(x.dtype) for x in op.like(*arguments) if x is not None]


def run_kernels(
    op: FusedOp,
    library: ctypes.CDLL,
    arguments: Sequence[Any],
    grads: Sequence[Tensor],
    wanted: Sequence[str],
    seed: int = 0,
    blocks: int | None = None,
) -> dict[str, Tensor]:
    """The outputs, and the gradients of the arguments that are `wanted`, by name, of an op's two kernels.

    Args:
        seed: picks the order of the threads.
        blocks: in x, where that is not what the launches in the package have.
    """
    x = arguments[0]
    rows = x.shape[:2].numel()
    sizes, like = op.sizes(*arguments), dict(zip(op.outputs, op.like(*arguments), strict=True))
    given = {
        key: guarded_copy(y) if isinstance(y, Tensor) else as_argument(y)
        for key, y in zip(op.arguments, arguments, strict=True)
    }
    outputs = {key: None if y is None else guarded(y.shape, y.dtype) for key, y in like.items()}
    left = iter(grads)
    upper = {f"d{key}": None if y is None else guarded_copy(next(left)) for key, y in like.items()}
    lower = {f"d{key}": None for key in op.tensors}
    for key in wanted:
        shape, dtype = given[key].shape, given[key].dtype
        if key in op.parameters:
            shape, dtype = (blocks or -(-rows // PART_ROWS), *shape), torch.float32
        lower[f"d{key}"] = guarded(shape, dtype)
    for i, (part, named) in enumerate((("forward", outputs), ("backward", {**upper, **lower}))):
        named = {**given, **named, **sizes}
        name, (x_blocks, y_blocks) = f"{op.name}_{part}", grid(named)
        values = [named[key] for key in PROGRAM.kernels[name].split()]
        launch(library, name, (blocks or x_blocks, y_blocks), THREADS, values, seed + i)
    made = {key: y for key, y in (outputs | lower).items() if y is not None}
    return {key: y.sum(0) if key[1:] in op.parameters else y.clone() for key, y in made.items()}


def exact(op: FusedOp, arguments: Sequence[Any], grads: Sequence[Tensor], wanted: Sequence[str]) -> dict[str, Tensor]:
    """The same by the formula, in float64."""
    wide = [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in arguments]
    named = dict(zip(op.arguments, wide, strict=True))
    leaves = [named[x].requires_grad_() for x in wanted]
    outputs = getattr(fused_torch, op.name)(*wide)
    differentiable, weights = zip(
        *((x, y) for x, y in zip(outputs, grads, strict=True) if x.requires_grad), strict=True
    )
    found = torch.autograd.grad(differentiable, leaves, [x.double() for x in weights], materialize_grads=True)
    names = [key for key, x in zip(op.outputs, op.like(*arguments), strict=True) if x is not None]
    results = dict(zip(names, (x.detach() for x in outputs), strict=True))
    return results | {f"d{key}": x for key, x in zip(wanted, found, strict=True)}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """The relative error in norm of each tensor is at most `tolerance`."""
    assert found.keys() == expected.keys()
    for name, y in expected.items():
        error, bound = (found[name].double() - y).norm(), tolerance * float(y.norm())
        assert error <= bound, f"{name}: error {error:.1e} above {bound:.1e}"  # also fails on NaN
