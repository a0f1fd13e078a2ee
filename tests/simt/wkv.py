"""Runs the kernels of cuda/wkv6.cu and cuda/wkv7.cu in the emulator."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from tests.ops.cases import WKV6, WKV7, Recurrence
from tests.ops.cuda.stub import parameters
from tests.simt.harness import CUDA, guarded, guarded_copy, launch

FP32, BF16 = torch.float32, torch.bfloat16
CHUNK = 16  # as in wkv.cuh


def source(wkv: Recurrence) -> Path:
    return CUDA / f"{wkv.name}.cu"


def options(n: int, dtype: torch.dtype) -> tuple[str, str]:
    return f"-DHEAD_SIZE={n}", f"-DIO_BF16={int(dtype == BF16)}"


def launch_shape(inputs: list[Tensor]) -> tuple[tuple[int, int], int]:
    batch, _, n_head, n = inputs[0].shape
    kept = n if n <= 64 else 32
    return (batch * n_head, n // kept), 2 * kept


def run_kernels(
    wkv: Recurrence,
    library: ctypes.CDLL,
    inputs: list[Tensor],
    state: Tensor,
    seq_start: Tensor | None,
    weights: list[Tensor | None],
    seed: int,
    allocate: Callable[[tuple[int, ...], torch.dtype], Tensor] = guarded,
) -> list[Tensor]:
    """What `cases.run` returns, by the three kernels. weights[1] may be None: no gradient of the last state.
    `allocate` makes the tensors with a T."""
    batch, n_steps, n_head, n = shape = inputs[0].shape
    named = {
        **{x: allocate(y.shape, y.dtype).copy_(y) for x, y in zip(wkv.inputs, inputs, strict=True) if y.dim() == 4},
        **{f"d{x}": allocate(shape, y.dtype) for x, y in zip(wkv.inputs, inputs, strict=True)},
        "y": allocate(shape, inputs[0].dtype),
        "dy": allocate(shape, inputs[0].dtype).copy_(weights[0]),
        "state_in": guarded_copy(state),
        "state_out": guarded(state.shape, FP32),
        "saved_states": guarded((batch, n_head, -(-n_steps // CHUNK), n, n), FP32),
        "seq_start": None if seq_start is None else guarded_copy(seq_start.to(torch.uint8)),
        "grad_state": None if weights[1] is None else guarded_copy(weights[1]),
        "dstate": guarded(state.shape, FP32),
        "steps": n_steps,
    }
    named["heads"] = named["r"].stride(1) // n
    if wkv is WKV7:
        named |= {x: allocate(shape, FP32) for x in ("saved_u", "du")}
    else:
        named |= {"u": guarded_copy(inputs[4]), "du": guarded((batch, n_head, n), FP32)}
    text = source(wkv).read_text()
    for i, part in enumerate(("forward", "backward_values", "backward_keys")):
        kernel = f"{wkv.name}_{part}"
        launch(library, kernel, *launch_shape(inputs), [named[x] for x in parameters(text, kernel)], seed + i)
    if wkv is WKV6:
        named["du"] = named["du"].sum(0)
    names = ("y", "state_out", *(f"d{x}" for x in wkv.inputs), "dstate")
    return [named[x].clone() for x in names]


def launch_forward(wkv: Recurrence, library: ctypes.CDLL, inputs: list[Tensor], state: Tensor, grid, block):
    """y and the last state of a forward that saves nothing."""
    outputs = guarded(inputs[0].shape, inputs[0].dtype), guarded(state.shape, FP32)
    saved = [None] * (1 if wkv is WKV6 else 2)
    args = [*map(guarded_copy, (*inputs, state)), None, *outputs, *saved, *inputs[0].shape[1:3]]
    launch(library, f"{wkv.name}_forward", grid, block, args, 5)
    return outputs
