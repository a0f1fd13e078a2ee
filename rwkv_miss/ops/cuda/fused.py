"""What the models compute between matrix products, on NVIDIA GPUs: the kernels of cuda/fused.cu."""

from __future__ import annotations

import struct
from collections.abc import Mapping

import torch
from torch import Tensor

from rwkv_miss.ops.cuda import driver, kernel
from rwkv_miss.ops.cuda.programs import IO, PROGRAMS
from rwkv_miss.ops.fused_operators import GATED, RELU_SQUARED, TOKEN_MIX, FusedOp

# Tokens whose gradients of parameters are summed at a time.
PART_ROWS = 16
# Threads of a block and neighbours that each has: THREADS and WIDTH of cuda/fused.cu.
THREADS, WIDTH = 128, 8
# About as many blocks as the largest GPUs run at once. It is the same on all, so that a run's results are.
_BLOCKS = 2048
_WIDEST_HEAD = 32 * WIDTH


def unusable(op: FusedOp, device: torch.device, dtype: torch.dtype, width: int) -> str | None:
    """Why the kernels cannot take such tensors here, or None if they can; see `Kernels` in
    rwkv_miss/ops/fused_operators.py. Compiles and loads them at the first use.

    Raises:
        UserError: this is the first use, and torch is recording a CUDA graph.
    """
    if reason := driver.refused(device):
        return reason
    if dtype not in IO:
        return f"the tensors are {dtype}, they take float32 and bfloat16"
    if op not in (RELU_SQUARED, GATED) and width % WIDTH:
        return f"{op.name} is {width} wide, they take multiples of {WIDTH}"
    if op not in (RELU_SQUARED, GATED, TOKEN_MIX) and width > _WIDEST_HEAD:
        return f"the head size is {width}, they take at most {_WIDEST_HEAD}"
    return kernel.unusable(PROGRAMS["fused"], dtype, device)


def launch(op: FusedOp, name: str, arguments: Mapping[str, Tensor | int | float | None]) -> None:
    """Launches a kernel; see `rwkv_miss.ops.fused_operators.Launch`."""
    x = next(iter(arguments.values()))
    assert isinstance(x, Tensor)
    if x.numel() == 0:
        if isinstance(dlast := arguments.get("dlast"), Tensor):
            dlast.zero_()  # what has no tokens has no gradient
        return
    given = {key: as_argument(y) for key, y in arguments.items()}
    kernel.launch(PROGRAMS["fused"], x.dtype, name, x.device, grid(op, arguments), THREADS, given)


def as_argument(x: Tensor | int | float | None) -> Tensor | int | None:
    """x as a kernel takes it; tensors that are to be filled are `kernel.ready` as they come."""
    if isinstance(x, float):
        (bits,) = struct.unpack("i", struct.pack("f", x))
        return bits
    return kernel.ready(x) if isinstance(x, Tensor) else x


def grid(op: FusedOp, arguments: Mapping[str, Tensor | int | float | None]) -> tuple[int, int]:
    """The blocks in x and in y of a kernel that is given these arguments."""
    sizes = {key: x for key, x in arguments.items() if isinstance(x, int)}
    if "count" in sizes:
        return -(-sizes["count"] // (THREADS * WIDTH)), 1
    if op is TOKEN_MIX:
        rows, heads, n = sizes["batch"] * sizes["steps"], sizes["channels"] // WIDTH, WIDTH
    else:
        rows, heads, n = sizes["rows"], sizes["heads"], sizes["n"]
    lanes = 1 << (n // WIDTH - 1).bit_length()  # threads of a head: a power of two
    columns = -(-heads // (THREADS // lanes))
    parts = [len(x) for name in op.parameters if isinstance(x := arguments.get(f"d{name}"), Tensor)]
    return parts[0] if parts else min(rows, -(-_BLOCKS // columns)), columns
