"""Runs the kernels of cuda/wkv6.cu, cuda/wkv7.cu and cuda/wkv7_chunk.cu in the emulator, without a driver and torch's
operators."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor

from rwkv_miss.ops.cuda.programs import PROGRAMS
from rwkv_miss.ops.cuda.wkv import CHUNK_SAVE_EVERY, SAVE_EVERY, launch_shape
from tests.ops.cases import WKV6, WKV7, WkvCase
from tests.simt.harness import build_once, guarded, guarded_copy, launch

FP32, BF16 = torch.float32, torch.bfloat16
Allocate = Callable[[tuple[int, ...], torch.dtype], Tensor]
"""Makes a tensor of that shape and dtype."""


def load_kernels(wkv: WkvCase, n: int, dtype: torch.dtype) -> ctypes.CDLL:
    """The op's kernels for the emulator, for one head size and dtype."""
    program = PROGRAMS[wkv.name]
    return build_once(program.source, *program.variants[dtype, n])


def _arguments(
    wkv: WkvCase,
    inputs: list[Tensor],
    state: Tensor,
    seq_start: Tensor | None,
    weights: list[Tensor | None],
    allocate: Allocate,
) -> dict[str, Tensor | int | None]:
    """What the kernels of all ops take, by the parameters' names."""
    shape = inputs[0].shape
    named = {
        **{x: allocate(y.shape, y.dtype).copy_(y) for x, y in zip(wkv.inputs, inputs, strict=True) if y.dim() == 4},
        **{f"d{x}": allocate(shape, y.dtype) for x, y in zip(wkv.inputs, inputs, strict=True)},
        "y": allocate(shape, inputs[0].dtype),
        "dy": allocate(shape, inputs[0].dtype).copy_(weights[0]),
        "state_in": guarded_copy(state),
        "state_out": guarded(state.shape, FP32),
        "seq_start": None if seq_start is None else guarded_copy(seq_start.to(torch.uint8)),
        "grad_state": None if weights[1] is None else guarded_copy(weights[1]),
        "dstate": guarded(state.shape, FP32),
        "steps": shape[1],
    }
    # More than the inputs' heads if `allocate` leaves room for more.
    return named | {"heads": named["r"].stride(1) // shape[3]}


def run_kernels(
    wkv: WkvCase,
    library: ctypes.CDLL,
    inputs: list[Tensor],
    state: Tensor,
    seq_start: Tensor | None,
    weights: list[Tensor | None],
    seed: int,
    allocate: Allocate = guarded,
) -> list[Tensor]:
    """Runs the three kernels of an op.

    Args:
        library: the kernels for the dtype and head size of the inputs.
        weights: the gradients of y and of the last state; that of the last state may be None.
        seed: picks the order of the threads.
        allocate: makes the tensors of shape (B, T, H, N).

    Returns:
        What `cases.run` returns: y, the last state, the gradients of the inputs and of the first state.
    """
    batch, n_steps, n_head, n = shape = inputs[0].shape
    named = _arguments(wkv, inputs, state, seq_start, weights, allocate)
    named["saved_states"] = guarded((batch, n_head, -(-n_steps // SAVE_EVERY), n, n), FP32)
    if wkv is WKV7:
        named |= {x: allocate(shape, FP32) for x in ("saved_u", "du")}
    else:
        named |= {"u": guarded_copy(inputs[4]), "du": guarded((batch, n_head, n), FP32)}
    for i, (kernel, parameters) in enumerate(PROGRAMS[wkv.name].kernels.items()):
        arguments = [named[x] for x in parameters.split()]
        launch(library, kernel, *launch_shape(batch, n_head, n), arguments, seed + i)
    if wkv is WKV6:
        named["du"] = named["du"].sum(0)
    names = ("y", "state_out", *(f"d{x}" for x in wkv.inputs), "dstate")
    return [named[x].clone() for x in names]


def run_chunk(
    library: ctypes.CDLL,
    inputs: list[Tensor],
    state: Tensor,
    seq_start: Tensor | None,
    weights: list[Tensor | None],
    seed: int,
    allocate: Allocate = guarded,
    n_blocks: int = 1,
) -> list[Tensor]:
    """`run_kernels` for the two kernels of cuda/wkv7_chunk.cu, with so many blocks for each head."""
    batch, n_steps, n_head, n = inputs[0].shape
    named = _arguments(WKV7, inputs, state, seq_start, weights, allocate)
    named["saved_states"] = guarded((batch, n_head, -(-n_steps // CHUNK_SAVE_EVERY), n, n), BF16)
    named["scratch"] = guarded((batch, n_head, n_blocks, CHUNK_SAVE_EVERY // SAVE_EVERY - 1, n, n), BF16)
    for i, (kernel, parameters) in enumerate(PROGRAMS["wkv7_chunk"].kernels.items()):
        launch(library, kernel, (batch * n_head, n_blocks), 2 * n, [named[x] for x in parameters.split()], seed + i)
    return [named[x].clone() for x in ("y", "state_out", *(f"d{x}" for x in "rzkvab"), "dstate")]


def launch_forward(
    wkv: WkvCase, library: ctypes.CDLL, inputs: list[Tensor], state: Tensor, grid: tuple[int, int], block: int
) -> tuple[Tensor, Tensor]:
    """y and the last state of a forward that saves nothing for a backward."""
    outputs = guarded(inputs[0].shape, inputs[0].dtype), guarded(state.shape, FP32)
    saved = [None] * (1 if wkv is WKV6 else 2)
    args = [*map(guarded_copy, (*inputs, state)), None, *outputs, *saved, *inputs[0].shape[1:3]]
    launch(library, f"{wkv.name}_forward", grid, block, args, 5)
    return outputs
