"""Registers, spills, shared memory and blocks per SM of every kernel in the table of programs, for each variant and
architecture, as NVRTC reports them: needs neither nvcc nor a GPU.

`python -m tests.simt.resources` writes docs/kernels_resources.md; with `--sample` it measures each variant for one
architecture alone, and prints the table that it would write.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Hashable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from cuda.bindings import nvrtc

from rwkv_miss.ops.cuda import fused
from rwkv_miss.ops.cuda.kernel import Program
from rwkv_miss.ops.cuda.nvrtc import SOURCES
from rwkv_miss.ops.cuda.programs import PROGRAMS
from rwkv_miss.ops.cuda.wkv import launch_shape
from tests.simt.harness import macros

TABLE = Path(__file__).parents[2] / "docs" / "kernels_resources.md"


def _wkv_threads(n: int) -> int:
    return launch_shape(1, 1, n)[1]


# For each program the function from the head size to the threads of a block.
THREADS = {"wkv6": _wkv_threads, "wkv7": _wkv_threads, "wkv7_chunk": lambda n: 2 * n, "fused": lambda n: fused.THREADS}


@dataclass(frozen=True)
class Multiprocessor:
    """What an SM holds at most: threads, blocks and KB of shared memory (CUDA C++ Programming Guide, technical
    specifications per compute capability)."""

    threads: int
    blocks: int
    shared_kb: int


ARCHITECTURES = {
    75: Multiprocessor(1024, 16, 64),
    80: Multiprocessor(2048, 32, 164),
    86: Multiprocessor(1536, 16, 100),
    89: Multiprocessor(1536, 24, 100),
    90: Multiprocessor(2048, 32, 228),
    100: Multiprocessor(2048, 32, 228),
    120: Multiprocessor(1536, 24, 100),
}
_REPORT = re.compile(
    r"entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    r".*?Used (\d+) registers(?:.*?(\d+) bytes smem)?",
    re.S,
)


@dataclass(frozen=True)
class Resources:
    """What one kernel takes. registers: per thread; local: bytes of stack or of spilled registers, which would lie in
    global memory; shared: bytes of shared memory per block; threads: of a block."""

    registers: int
    local: int
    shared: int
    threads: int


Key = tuple[str, int, str, int]
"""kernel, head size (0: none), type ("bf16" or "fp32"), architecture (such as 90)"""


def measure(
    source: Path, options: tuple[str, ...], architecture: int, threads: int, dynamic: Mapping[str, int] | None = None
) -> dict[str, Resources]:
    """Compiles a file as rwkv_miss/ops/cuda/nvrtc.py does, and reads from ptxas's report what each kernel takes.

    Args:
        dynamic: by the kernels' names, the bytes of dynamic shared memory of a block, of which ptxas does not know.
    """
    headers = sorted(SOURCES.glob("*.cuh"))
    texts, names = [x.read_bytes() for x in headers], [x.name.encode() for x in headers]
    error, program = nvrtc.nvrtcCreateProgram(source.read_bytes(), source.name.encode(), len(headers), texts, names)
    assert error == nvrtc.nvrtcResult.NVRTC_SUCCESS, error
    options = (*options, "--std=c++17", f"--gpu-architecture=sm_{architecture}", "--ptxas-options=-v")
    (error,) = nvrtc.nvrtcCompileProgram(program, len(options), [x.encode() for x in options])
    _, size = nvrtc.nvrtcGetProgramLogSize(program)
    buffer = bytes(size + 1)  # written in place
    nvrtc.nvrtcGetProgramLog(program, buffer)
    log = buffer[:size].decode()
    assert error == nvrtc.nvrtcResult.NVRTC_SUCCESS, f"{source} {options}: {error}\n{log}"
    found = {}
    for part in log.split("Compiling ")[1:]:
        name, stack, stores, loads, registers, shared = _REPORT.search(part).groups()
        found[name] = Resources(
            int(registers),
            int(stack) + int(stores) + int(loads),
            int(shared or 0) + (dynamic or {}).get(name, 0),
            threads,
        )
    nvrtc.nvrtcDestroyProgram(program)
    return found


def measure_variant(name: str, options: tuple[str, ...], architecture: int) -> dict[Key, Resources]:
    """`measure` for a program of the table and the options of one of its variants."""
    n, dtype = head_size(options), "bf16" if macros(options).get("IO_BF16") else "fp32"
    program = PROGRAMS[name]
    variant = next(x for x, of in program.variants.items() if of == options)
    found = measure(program.source, options, architecture, THREADS[name](n), program.shared_bytes(variant))
    return {(kernel, n, dtype, architecture): x for kernel, x in found.items()}


def head_size(options: tuple[str, ...]) -> int:
    """The head size that a program is compiled for, or 0 if it has none."""
    return macros(options).get("HEAD_SIZE", 0)


def shared_of_a_block(architecture: int) -> int:
    """The bytes of shared memory that a block may have: from compute capability 8.0 on it takes 1 KB beside its own."""
    return (ARCHITECTURES[architecture].shared_kb - (1 if architecture >= 80 else 0)) * 1024


def architectures(program: Program, variant: Hashable) -> list[int]:
    """The architectures that a variant of a program is for, and on which a block has its shared memory."""
    needs = max(program.shared_bytes(variant).values())
    return [x for x in ARCHITECTURES if divmod(x, 10) >= program.oldest and needs <= shared_of_a_block(x)]


def measure_all(sample: bool) -> dict[Key, Resources]:
    """Measures every variant of every program for every architecture, in as many processes as there are processors; for
    a sample, each variant for one architecture, which takes turns."""
    combinations = []
    for name, program in PROGRAMS.items():
        for turn, (variant, options) in enumerate(program.variants.items()):
            built_for = architectures(program, variant)
            chosen = [built_for[turn % len(built_for)]] if sample else built_for
            combinations += [(name, options, architecture) for architecture in chosen]
    combinations.sort(key=lambda x: -head_size(x[1]))  # what takes longest first
    found: dict[Key, Resources] = {}
    with ProcessPoolExecutor() as pool:
        for part in pool.map(measure_variant, *zip(*combinations, strict=True)):
            found |= part
    return found


def blocks_per_sm(resources: Resources, architecture: int) -> int:
    """How many blocks of a kernel an SM runs at once, by the rules of NVIDIA's occupancy calculator: an SM has 65,536
    registers, of which a thread takes a multiple of 8 and which are given to warps in fours; from compute capability
    8.0 on a block takes 1 KB of shared memory beside its own."""
    sm = ARCHITECTURES[architecture]
    warps = -(-resources.threads // 32)
    by_registers = 65536 // (-(-resources.registers // 8) * 8 * 32) // 4 * 4 // warps
    by_shared = sm.shared_kb * 1024 // max(1, resources.shared + (1024 if architecture >= 80 else 0))
    return min(sm.blocks, sm.threads // (32 * warps), by_registers, by_shared)


def rows(found: dict[Key, Resources]) -> list[list[str]]:
    """A row for each kernel, head size and type: shared memory, then registers and blocks per SM by architecture. "-"
    stands for an architecture that is none of the variant's `architectures`, and for the head size of one that has
    none."""
    lines = []
    for kernel, n, dtype in sorted({key[:3] for key in found}):
        of = {x: found[kernel, n, dtype, x] for x in ARCHITECTURES if (kernel, n, dtype, x) in found}
        shared = sorted({str(x.shared) for x in of.values()})
        cells = [_cell(of[x], x) if x in of else "-" for x in ARCHITECTURES]
        lines.append([kernel, str(n or "-"), dtype, "/".join(shared), *cells])
    return lines


def _cell(found: Resources, architecture: int) -> str:
    spilled = f" + {found.local} spilled" if found.local else ""
    return f"{found.registers}{spilled} ({blocks_per_sm(found, architecture)})"


def version() -> str:
    """NVRTC's version."""
    _, major, minor = nvrtc.nvrtcVersion()
    return f"{major}.{minor}"


def fingerprint() -> str:
    """Of all that the table follows from, NVRTC's version aside: the device code without comments, and its variants."""
    code = [" ".join(re.sub("//.*", "", x.read_text()).split()) for x in sorted(SOURCES.glob("*.cu*"))]
    variants = [(name, sorted(x.variants.values()), x.oldest, THREADS[name](64)) for name, x in PROGRAMS.items()]
    return hashlib.sha256(repr((code, variants, ARCHITECTURES)).encode()).hexdigest()[:16]


def text(found: dict[Key, Resources]) -> str:
    """The text of docs/kernels_resources.md."""
    header = ["kernel", "N", "type", "shared", *(f"sm_{x}" for x in ARCHITECTURES)]
    table = [header, ["---"] * len(header), *rows(found)]
    return f"""# Resources of the CUDA kernels

Written by `python -m tests.simt.resources`, by NVRTC {version()}, of sources {fingerprint()}.
tests/simt/test_resources.py compares that, and measures a seventh of the table again. The columns: bytes of shared
memory per block, then for each architecture the registers per thread and, in brackets, the blocks that an SM runs at
once; "-" is where it does not run. A block has 2N threads, but 64 above N = 64 in the scalar kernels of WKV, and
{fused.THREADS} in those without N. No kernel spills registers: a test fails if one does.

""" + "".join(f"| {' | '.join(row)} |\n" for row in table)


def parse(table: str) -> tuple[str, dict[tuple[str, ...], list[str]]]:
    """Reads what `text` wrote: what it was made with and of, and the rows by kernel, head size and type."""
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("|")]
    return re.search(r"by (NVRTC .*)\.$", table, re.M)[1], {tuple(row[:3]): row[3:] for row in cells[2:]}


if __name__ == "__main__":
    if "--sample" in sys.argv:
        print(text(measure_all(sample=True)), end="")
    else:
        TABLE.write_text(text(measure_all(sample=False)))
