"""Builds a .cu file for the CPU with simt.h, launches its kernels on torch CPU tensors, and reports what went wrong.

Tensors that a kernel gets come from `guarded`: bytes of 0xff (NaN in fp32 and bf16) lie before and after them, and in
them where the kernel is to write.
"""

from __future__ import annotations

import ctypes
import re
import subprocess
from pathlib import Path

import torch
from torch import Tensor

HERE = Path(__file__).parent
CUDA = HERE.parents[1] / "cuda"
GUARD = 256  # bytes on either side


class SimtError(AssertionError):
    """What the emulator found, with the lines of the kernel."""


def build(source: Path, folder: Path, *options: str) -> ctypes.CDLL:
    """Compiles a .cu file to a library in `folder` and loads it."""
    library = folder / f"{source.stem}{''.join(options)}.so".replace("/", "_")
    command = ["g++", "-std=c++17", "-O1", "-g", "-w", "-shared", "-fPIC", "-U_FORTIFY_SOURCE", f"-I{CUDA}"]
    command += ["-fno-gnu-unique"]  # or libraries loaded together share what templates hold in static variables
    command += ["-include", str(HERE / "simt.h"), *options, "-x", "c++", str(source), "-o", str(library)]
    subprocess.run(command, check=True, cwd=folder)
    return ctypes.CDLL(str(library))


def guarded(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor of 0xff bytes, 16-byte aligned, between two guards."""
    size = torch.Size(shape).numel() * dtype.itemsize
    buffer = torch.full((GUARD + size + GUARD + 16,), 0xFF, dtype=torch.uint8)
    first = GUARD + -buffer.data_ptr() % 16
    return buffer[first : first + size].view(dtype).view(shape)


def guarded_copy(tensor: Tensor) -> Tensor:
    return guarded(tuple(tensor.shape), tensor.dtype).copy_(tensor)


def launch(
    library: ctypes.CDLL,
    kernel: str,
    grid: tuple[int, int],
    block: int,
    arguments: list[Tensor | int | None],
    seed: int,
) -> None:
    """Runs a kernel to its end, the threads in an order that `seed` picks.

    Args:
        arguments: guarded tensors, 64-bit integers, or None for a null pointer.

    Raises:
        SimtError: a finding of the emulator, or a guard that was overwritten.
    """
    tensors = [x for x in arguments if isinstance(x, Tensor)]
    values = [x.data_ptr() if isinstance(x, Tensor) else x or 0 for x in arguments]
    ranges = [n for x in tensors for n in (x.data_ptr(), _bytes(x))]
    library.simt_launch.restype = ctypes.c_char_p
    report = library.simt_launch(
        ctypes.cast(getattr(library, kernel), ctypes.c_void_p),
        (ctypes.c_uint * 3)(*grid, 1),
        (ctypes.c_uint * 3)(block, 1, 1),
        (ctypes.c_uint64 * len(values))(*values),
        len(values),
        (ctypes.c_uint64 * len(ranges))(*ranges),
        len(tensors),
        ctypes.c_uint64(seed),
    )
    if report is not None:
        raise SimtError(f"{kernel}: {_with_lines(library, report.decode())}")
    for x in tensors:
        buffer = torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage())
        first = x.data_ptr() - buffer.data_ptr()
        beside = torch.cat((buffer[:first], buffer[first + _bytes(x) :]))
        if (beside != 0xFF).any():
            raise SimtError(f"{kernel}: memory beside a tensor of shape {tuple(x.shape)} was overwritten")


def _bytes(x: Tensor) -> int:
    """From the first element of x to behind its last."""
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return (last + 1) * x.element_size() if x.numel() else 0


def _with_lines(library: ctypes.CDLL, report: str) -> str:
    """The report with its return addresses replaced by the lines of .cu files, innermost first."""
    text, _, addresses = report.partition(" @")
    found = subprocess.run(
        ["addr2line", "-i", "-s", "-e", library._name, *addresses.split()], capture_output=True, text=True, check=True
    )
    lines = re.findall(r"^\S+\.cu:\d+", found.stdout, re.M)
    return f"{text} at {', '.join(lines)}" if lines else text
