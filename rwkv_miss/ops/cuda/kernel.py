"""Any CUDA kernel: compiled at its first use, loaded once for each device, launched with its arguments by name.

A program is one .cu file with what is known of it; `rwkv_miss.ops.cuda.programs` has the table of them.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from rwkv_miss.ops.cuda import driver
from rwkv_miss.ops.cuda.nvrtc import CompileError, compile_source

# Kernels read and write up to 16 bytes at once, from and to addresses that are multiples of it (cuda/common.cuh).
ALIGNMENT = 16


@dataclass(frozen=True, eq=False)
class Program:
    """A .cu file, the kernels in it, and the ways in which it can be compiled.

    Args:
        source: the file. It may include the headers of the folder cuda/ and those beside it.
        kernels: for each kernel (declared `extern "C"`) the names of its parameters in the order of its declaration,
            with spaces between them. Each parameter is a pointer or a `long long`.
        variants: NVRTC's options for each way to compile the file, by what the caller chooses with, such as the
            dtype of the tensors.
        shared: for each variant, by the kernel's name, the bytes of dynamic shared memory that a block is given; 0 for
            what is not named.
        oldest: the lowest compute capability that the file is written for, such as (8, 0); (0, 0) leaves it to NVRTC.
    """

    source: Path
    kernels: Mapping[str, str]
    variants: Mapping[Hashable, tuple[str, ...]]
    shared: Mapping[Hashable, Mapping[str, int]] = field(default_factory=dict)
    oldest: tuple[int, int] = (0, 0)

    def shared_bytes(self, variant: Hashable) -> dict[str, int]:
        """By the kernels' names, the bytes of dynamic shared memory of a block."""
        given = self.shared.get(variant, {})
        return {name: given.get(name, 0) for name in self.kernels}


def unusable(program: Program, variant: Hashable, device: torch.device) -> str | None:
    """Why a variant of a program cannot run on a device, or None if it can. Compiles and loads it at the first use.

    Raises:
        UserError: this is the first use, and torch is recording a CUDA graph.
    """
    if reason := driver.refused(device):
        return reason
    return functions_or_reason(program, variant, driver.location(device)[0])[1]


@cache
def functions_or_reason(program: Program, variant: Hashable, index: int) -> tuple[dict[str, object] | None, str | None]:
    """The kernels of a variant by name, loaded on the device of that index, and None; or None and why there are none.

    Raises:
        UserError: torch is recording a CUDA graph.
    """
    try:
        capability = driver.capability(index)
        if capability < program.oldest:
            have, need = (10 * major + minor for major, minor in (capability, program.oldest))
            return None, f"this GPU is sm_{have}, {program.source.name} is for sm_{need} and later"
        needs, has = max(program.shared_bytes(variant).values()), driver.shared_memory(index)
        if needs > has:
            return None, f"a block of {program.source.name} takes {needs} bytes of shared memory, this GPU has {has}"
        image = compile_source(program.source, program.variants[variant], capability)
        return driver.load(image, program.shared_bytes(variant), index), None
    except (CompileError, driver.DriverError) as error:
        return None, str(error)


@cache
def room(program: Program, variant: Hashable, name: str, index: int, block: int) -> int:
    """How many blocks of a kernel the device of that index runs at once. The other arguments are those of `launch`."""
    functions, reason = functions_or_reason(program, variant, index)
    assert functions is not None, reason
    return driver.room(functions[name], index, block, program.shared_bytes(variant)[name])


def launch(
    program: Program,
    variant: Hashable,
    name: str,
    device: torch.device,
    grid: tuple[int, int],
    block: int,
    arguments: Mapping[str, Tensor | int | None],
) -> None:
    """Puts a kernel on torch's current stream of the device, and returns before it has run.

    The caller may let go of the tensors at once: torch gives their memory to nothing that runs on this stream before
    the kernel.

    Args:
        variant: one for which `unusable` returned None.
        name: a key of `program.kernels`.
        grid: the number of blocks in x and in y.
        block: the number of threads in a block.
        arguments: by the names of the kernel's parameters; other names are left aside, so that one mapping can serve
            several kernels. Tensors are on the device, contiguous and aligned (see `ready`); None is a null pointer.

    Raises:
        DriverError: the launch failed, or a kernel that was launched before it did.
    """
    functions, reason = functions_or_reason(program, variant, driver.location(device)[0])
    assert functions is not None, reason
    values = [arguments[x] for x in program.kernels[name].split()]
    for x in values:
        assert not isinstance(x, Tensor) or (x.is_contiguous() and x.data_ptr() % ALIGNMENT == 0), name
    driver.launch(functions[name], device, grid, block, program.shared_bytes(variant)[name], values)


def ready(x: Tensor) -> Tensor:
    """x as kernels read it, contiguous and aligned: x itself, or a copy where it is not (as a slice need not be)."""
    x = x.contiguous()
    return x.clone() if x.data_ptr() % ALIGNMENT else x
