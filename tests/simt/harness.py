"""Builds a .cu file for the CPU with simt.h, launches its kernels on torch's CPU tensors, and reports what went wrong.

The tensors that a kernel gets are made by `guarded`: filled with bytes of 0xff (NaN in float32 and bfloat16), with more
such bytes before and behind them. So an element that a kernel forgot is NaN, and what it writes beside a tensor shows.
"""

from __future__ import annotations

import ctypes
import re
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

HERE = Path(__file__).parent
CUDA = HERE.parents[1] / "cuda"
GUARD = 256  # bytes before and behind each tensor


class SimtError(AssertionError):
    """The emulator found a fault in a kernel; the message names it and the lines of the .cu file."""


def build(source: Path, folder: Path, *options: str) -> ctypes.CDLL:
    """Compiles a .cu file with g++ and these options to a library in `folder`, and loads it."""
    library = folder / f"{source.stem}{''.join(options)}.so".replace("/", "_")
    command = ["g++", "-std=c++17", "-O1", "-g", "-w", "-shared", "-fPIC", "-U_FORTIFY_SOURCE", f"-I{CUDA}"]
    command += ["-fno-gnu-unique"]  # otherwise libraries in one process share the static variables of templates
    command += ["-include", str(HERE / "simt.h"), *options, "-x", "c++", str(source), "-o", str(library)]
    subprocess.run(command, check=True, cwd=folder)
    return ctypes.CDLL(str(library))


@cache
def build_once(source: Path, *options: str) -> ctypes.CDLL:
    """`build`, but each source with the same options only once in this process, for all test modules."""
    return build(source, Path(_folder().name), *options)


@cache
def _folder() -> TemporaryDirectory:
    """A folder that is removed when the process ends."""
    return TemporaryDirectory(prefix="simt-")


def macros(options: Sequence[str]) -> dict[str, int]:
    """The compiler's options -DNAME=INTEGER as numbers by name."""
    return {name: int(value) for name, value in (x.removeprefix("-D").split("=") for x in options)}


def parameters(source: Path, kernel: str) -> dict[str, str]:
    """The types of a kernel's parameters by their names, in the order of its declaration in a .cu file, without const
    and __restrict__; those of pointers end with *."""
    text = source.read_text()
    declared = re.search(rf"\b{kernel}\((.*?)\)\s*{{", text, re.S)[1].replace("__restrict__", "").replace("const", "")
    pairs = (re.fullmatch(r"(.*?)\s*(\*?)\s*(\w+)", " ".join(x.split())) for x in declared.split(","))
    return {m[3]: m[1].strip() + m[2] for m in pairs}


def guarded(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor filled with bytes of 0xff, 16-byte aligned, between two guards of such bytes."""
    size = torch.Size(shape).numel() * dtype.itemsize
    buffer = torch.full((GUARD + size + GUARD + 16,), 0xFF, dtype=torch.uint8)
    first = GUARD + -buffer.data_ptr() % 16
    return buffer[first : first + size].view(dtype).view(shape)


def guarded_copy(tensor: Tensor) -> Tensor:
    """A copy of a tensor between two guards."""
    return guarded(tuple(tensor.shape), tensor.dtype).copy_(tensor)


def launch(
    library: ctypes.CDLL,
    kernel: str,
    grid: tuple[int, int],
    block: int,
    arguments: list[Tensor | int | None],
    seed: int,
) -> None:
    """Runs a kernel to its end. It may touch the memory of the tensors that it is given, and no other.

    Args:
        library: from `build`.
        kernel: its name.
        grid: the number of blocks in x and in y.
        block: the number of threads in a block.
        arguments: guarded tensors, 64-bit integers, or None for a null pointer.
        seed: picks the order in which the threads run.

    Raises:
        SimtError: the emulator found a fault, or the kernel wrote into a guard.
    """
    tensors = [x for x in arguments if isinstance(x, Tensor)]
    values = [x.data_ptr() if isinstance(x, Tensor) else x or 0 for x in arguments]
    code = ctypes.cast(getattr(library, kernel), ctypes.c_void_p).value
    ranges = [(x.data_ptr(), _bytes(x)) for x in tensors]
    report = emulate(library, code, (*grid, 1), (block, 1, 1), values, ranges, seed)
    if report is not None:
        raise SimtError(f"{kernel}: {_with_lines(library, report)}")
    for x in tensors:
        buffer = torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage())
        first = x.data_ptr() - buffer.data_ptr()
        beside = torch.cat((buffer[:first], buffer[first + _bytes(x) :]))
        if (beside != 0xFF).any():
            raise SimtError(f"{kernel}: memory beside a tensor of shape {tuple(x.shape)} was overwritten")


def emulate(
    library: ctypes.CDLL,
    code: int,
    grid: Sequence[int],
    block: Sequence[int],
    arguments: Sequence[int],
    ranges: Sequence[tuple[int, int]],
    seed: int,
) -> str | None:
    """Runs a kernel over its grid.

    Args:
        code: the address of the kernel's function in `library`.
        grid, block: three numbers each.
        arguments: pointers and integers, 64 bits each.
        ranges: (address, bytes) of the global memory that the kernel may touch.
        seed: picks the order in which the threads run.

    Returns:
        What the emulator found to be wrong, or None.
    """
    flat = [x for pair in ranges for x in pair]
    library.simt_launch.restype = ctypes.c_char_p
    report = library.simt_launch(
        ctypes.c_void_p(code),
        (ctypes.c_uint * 3)(*grid),
        (ctypes.c_uint * 3)(*block),
        (ctypes.c_uint64 * len(arguments))(*arguments),
        len(arguments),
        (ctypes.c_uint64 * len(flat))(*flat),
        len(ranges),
        ctypes.c_uint64(seed),
    )
    return None if report is None else report.decode()


def _bytes(x: Tensor) -> int:
    """The number of bytes from the first element of x to the end of its last."""
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return (last + 1) * x.element_size() if x.numel() else 0


def _with_lines(library: ctypes.CDLL, report: str) -> str:
    """The report with the lines of the .cu file in the place of the return addresses at its end, innermost first."""
    text, _, addresses = report.partition(" @")
    found = subprocess.run(
        ["addr2line", "-i", "-s", "-e", library._name, *addresses.split()], capture_output=True, text=True, check=True
    )
    lines = re.findall(r"^\S+\.cu:\d+", found.stdout, re.M)
    return f"{text} at {', '.join(lines)}" if lines else text
