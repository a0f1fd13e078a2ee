"""WKV-6 and WKV-7 on NVIDIA GPUs: the kernels of cuda/wkv6.cu, cuda/wkv7.cu and cuda/wkv7_chunk.cu as operators of
torch.library."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from rwkv_miss.ops.cuda import driver, kernel
from rwkv_miss.ops.cuda.programs import CHUNK_HEAD_SIZES, HEAD_SIZES, IO, PROGRAMS
from rwkv_miss.ops.wkv_operators import WKV6, WKV7, WKV7_CHUNK, WkvOp, register

# Steps between the states that the forward keeps for the backward: CHUNK of cuda/wkv.cuh.
SAVE_EVERY = 16

# The same for SAVE_EVERY of cuda/wkv7_chunk.cu.
CHUNK_SAVE_EVERY = 64

# The fewest steps of a block's share of a head: beside them, what a block does once is little (its first reads, and the
# states that it computes again at its two ends).
_SHARE = 256


def scalar_unusable(op: str, device: torch.device, dtype: torch.dtype, n: int) -> str | None:
    """Why the scalar kernels of "wkv6" or "wkv7" cannot take tensors of that device, dtype and head size here, or None
    if they can. Compiles and loads them at the first use.

    Raises:
        UserError: this is the first use, and torch is recording a CUDA graph.
    """
    if reason := driver.refused(device):
        return reason
    if dtype not in IO:
        return f"the tensors are {dtype}, it takes float32 and bfloat16"
    if n not in HEAD_SIZES:
        return f"the head size is {n}, it takes {', '.join(map(str, HEAD_SIZES))}"
    return kernel.unusable(PROGRAMS[op], (dtype, n), device)


def unusable(op: str, device: torch.device, dtype: torch.dtype, n: int) -> str | None:
    """The same for the kernels that `wkv6` and `wkv7` take."""
    if chunk_unusable(op, device, dtype, n) is None:
        return None
    return scalar_unusable(op, device, dtype, n)


@torch.compiler.assume_constant_result
def chunk_unusable(op: str, device: torch.device, dtype: torch.dtype, n: int) -> str | None:
    """Why a chunked kernel cannot take such tensors here, or None if it can, as on the meta device, where nothing is
    computed. Compiles and loads it at the first use.

    Raises:
        UserError: this is the first use, and torch is recording a CUDA graph.
    """
    if op != "wkv7":
        return f"there is none for {op}"
    if dtype != torch.bfloat16:
        return f"the tensors are {dtype}, it takes bfloat16"
    if n not in CHUNK_HEAD_SIZES:
        return f"the head size is {n}, it takes {', '.join(map(str, CHUNK_HEAD_SIZES))}"
    return None if device.type == "meta" else kernel.unusable(PROGRAMS["wkv7_chunk"], (dtype, n), device)


def kernel_taken(op: str, device: torch.device, dtype: torch.dtype, n: int) -> str:
    """Which kernels `wkv6` and `wkv7` take for such tensors, in words, and why not the chunked ones."""
    if reason := chunk_unusable(op, device, dtype, n):
        return f"scalar kernels; no chunked one: {reason}"
    return "chunked kernels on tensor cores"


def launch_shape(batch: int, n_head: int, n: int) -> tuple[tuple[int, int], int]:
    """The grid and the threads in a block of every scalar kernel (cuda/wkv.cuh)."""
    kept = n if n <= 64 else 32  # value or key indices of the state that one block holds
    return (batch * n_head, n // kept), 2 * kept


def blocks_for_a_head(room: int, heads: int, n_steps: int) -> int:
    """How many blocks share out the documents of a head in cuda/wkv7_chunk.cu, of `room` that a device runs at once."""
    return max(1, min(room // heads, n_steps // _SHARE))


def _chunk_shape(part: str, v: Tensor, seq_start: Tensor | None) -> tuple[tuple[int, int], int]:
    """The grid and the threads in a block of a kernel of cuda/wkv7_chunk.cu. Where documents begin is on the device,
    and is not waited for: a head has more blocks if they may begin within rows."""
    batch, n_steps, n_head, n = v.shape
    heads, threads, blocks = batch * n_head, 2 * n, 1
    if seq_start is not None:
        index = driver.location(v.device)[0]
        room = kernel.room(PROGRAMS["wkv7_chunk"], (v.dtype, n), f"wkv7_chunk_{part}", index, threads)
        blocks = blocks_for_a_head(room, heads, n_steps)
    return (heads, blocks), threads


def _forward(
    op: WkvOp,
    inputs: Sequence[Tensor],
    state: Tensor,
    seq_start: Tensor | None,
    y: Tensor,
    last: Tensor,
    saved: Sequence[Tensor | None],
) -> None:
    """Fills y, the last state and what is saved for the backward; see `register`."""
    if y.numel() == 0:
        last.copy_(state)
        return
    named = _by_name(op, inputs, seq_start, saved)
    _launch(op, ("forward",), named | {"state_in": _ready(state), "y": y, "state_out": last})


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
    v = inputs[op.v]
    if v.numel() == 0:
        for x in grads:
            x.zero_()
        if grad_state is not None:
            grads[-1].copy_(grad_state)
        return
    named = _by_name(op, inputs, seq_start, saved)
    named |= {"dy": v.new_zeros(v.shape) if grad_y is None else _ready(grad_y), "grad_state": _ready(grad_state)}
    # The gradients of what the forward saved beside the states: the first kernel writes them, the second reads them.
    named |= {f"d{x.removeprefix('saved_')}": y.new_empty(y.shape) for x, y in zip(op.saved, saved[1:], strict=True)}
    named |= dict(zip([*(f"d{letter}" for letter in op.inputs), "dstate"], grads, strict=True))
    if op is WKV7_CHUNK:
        grid, _ = _chunk_shape("backward", v, seq_start)
        named["scratch"] = v.new_empty((*grid, CHUNK_SAVE_EVERY // SAVE_EVERY - 1, v.shape[3], v.shape[3]))
    _launch(op, ("backward",) if op is WKV7_CHUNK else ("backward_values", "backward_keys"), named)


def _by_name(
    op: WkvOp, inputs: Sequence[Tensor], seq_start: Tensor | None, saved: Sequence[Tensor | None]
) -> dict[str, Tensor | None]:
    names = [*op.inputs, "seq_start", "saved_states", *op.saved]
    return dict(zip(names, map(_ready, (*inputs, seq_start, *saved)), strict=True))


def _ready(x: Tensor | None) -> Tensor | None:
    return None if x is None else kernel.ready(x)


def _launch(op: WkvOp, parts: tuple[str, ...], tensors: dict[str, Tensor | None]) -> None:
    """Launches the op's kernels of those names, one after the other."""
    v = tensors["v"]
    assert v is not None
    batch, n_steps, n_head, n = v.shape
    arguments = {**tensors, "steps": n_steps, "heads": n_head}
    for part in parts:
        chunked = op is WKV7_CHUNK
        grid, block = _chunk_shape(part, v, tensors["seq_start"]) if chunked else launch_shape(batch, n_head, n)
        kernel.launch(PROGRAMS[op.name], (v.dtype, n), f"{op.name}_{part}", v.device, grid, block, arguments)


# (*inputs, state, seq_start) -> (y, the last state), as in `rwkv_miss.ops`, with arguments that were checked.
wkv6 = register(WKV6, "cuda", SAVE_EVERY, _forward, _backward)
wkv7_scalar = register(WKV7, "cuda", SAVE_EVERY, _forward, _backward)
wkv7_chunk = register(WKV7_CHUNK, "cuda", CHUNK_SAVE_EVERY, _forward, _backward)


def wkv7(*arguments: Tensor | None) -> tuple[Tensor, Tensor]:
    """The same, by the chunked kernels where they can be used."""
    v = arguments[WKV7.v]
    assert v is not None
    refused = chunk_unusable("wkv7", v.device, v.dtype, operator.index(v.shape[-1]))
    return (wkv7_scalar if refused else wkv7_chunk)(*arguments)
