"""What the models compute between matrix products, on NVIDIA GPUs: the kernels of cuda/fused.cu."""

from __future__ import annotations

import struct
from collections.abc import Mapping

import torch
from torch import Tensor

from rwkv_miss.ops.cuda import driver
from rwkv_miss.ops.cuda import kernel as any_kernel
from rwkv_miss.ops.cuda.programs import IO, PROGRAMS
from rwkv_miss.ops.fused_operators import GATED, OPS, RELU_SQUARED, TOKEN_MIX, FusedOp

# Tokens whose gradients of parameters are summed at a time.
PART_ROWS = 16
# Threads of a block, and neighbours that each has: THREADS and WIDTH of cuda/fused.cu.
THREADS, WIDTH = 128, 8
# About as many blocks as the largest GPUs run at once.
BLOCKS = 2048
_WIDEST_HEAD = 32 * WIDTH
_PARTS = {f"d{name}" for op in OPS for name in op.parameters}

Arguments = Mapping[str, Tensor | int | float | None]


def unusable(op: FusedOp, device: torch.device, dtype: torch.dtype, width: int) -> str | None:
    """Why the kernels cannot take such tensors here, or None if they can; see `fused_operators.Kernels`. Compiles and
    loads them at the first use.

    Raises:
        UserError: this is the first use, and torch is recording a CUDA graph.
    """
    if reason := driver.refused(device):
        return reason
    if dtype not in IO:
        return f"the tensors are {dtype}, they take float32 and bfloat16"
    if op not in (RELU_SQUARED, GATED) and width % WIDTH:
        return f"{op.name}: the last size is {width}, they take multiples of {WIDTH}"
    if op not in (RELU_SQUARED, GATED, TOKEN_MIX) and width > _WIDEST_HEAD:
        return f"{op.name}: the head size is {width}, they take up to {_WIDEST_HEAD}"
    return any_kernel.unusable(PROGRAMS["fused"], dtype, device)


def launch(kernel: str, arguments: Arguments) -> None:
    """Launches a kernel; see `fused_operators.Launch`."""
    x = next(iter(arguments.values()))
    assert isinstance(x, Tensor)
    if x.numel() == 0:
        if isinstance(dlast := arguments.get("dlast"), Tensor):
            dlast.zero_()
        return
    given = {name: as_argument(y) for name, y in arguments.items()}
    any_kernel.launch(PROGRAMS["fused"], x.dtype, kernel, x.device, grid(arguments), THREADS, given)


def as_argument(x: Tensor | int | float | None) -> Tensor | int | None:
    """x as a kernel takes it, a float as its bits. What is to be filled was just made, and is `ready` as it is."""
    if isinstance(x, float):
        (bits,) = struct.unpack("i", struct.pack("f", x))
        return bits
    return any_kernel.ready(x) if isinstance(x, Tensor) else x


def grid(arguments: Arguments) -> tuple[int, int]:
    """The blocks in x and in y of a kernel (cuda/fused.cu)."""
    sizes = {name: x for name, x in arguments.items() if isinstance(x, int)}
    if "count" in sizes:
        return -(-sizes["count"] // (THREADS * WIDTH)), 1
    if "channels" in sizes:
        rows, heads, n = sizes["batch"] * sizes["steps"], sizes["channels"] // WIDTH, WIDTH
    else:
        rows, heads, n = sizes["rows"], sizes["heads"], sizes["n"]
    lanes = 1 << (n // WIDTH - 1).bit_length()  # threads of a head
    columns = -(-heads // (THREADS // lanes))
    parts = [len(x) for name, x in arguments.items() if name in _PARTS and isinstance(x, Tensor)]
    return parts[0] if parts else min(rows, -(-BLOCKS // columns)), columns
