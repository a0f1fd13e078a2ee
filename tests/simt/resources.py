"""Registers, spills, shared memory and blocks per SM of every kernel, for every head size, type and architecture, as
NVRTC reports them: needs neither nvcc nor a GPU.

`python -m tests.simt.resources` writes docs/kernels_resources.md; with `--print` it only prints it.
"""

from __future__ import annotations

import re
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from cuda.bindings import nvrtc

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "docs" / "kernels_resources.md"
SOURCES = ("wkv6.cu", "wkv7.cu")
HEAD_SIZES = (128, 96, 64, 32, 24, 16, 8)  # what takes longest first
TYPES = {"bf16": 1, "fp32": 0}


@dataclass(frozen=True)
class Multiprocessor:
    """What an SM has (CUDA C++ Programming Guide, technical specifications per compute capability)."""

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
    r".*?Used (\d+) registers.*?(\d+) bytes smem",
    re.S,
)


@dataclass(frozen=True)
class Resources:
    """registers: per thread. local: bytes of stack or of spills, which would be in global memory. shared: bytes of
    static shared memory per block."""

    registers: int
    local: int
    shared: int


Key = tuple[str, int, str, int]  # kernel, head size, type, architecture


def measure(source: str, n: int, dtype: str, architecture: int) -> dict[Key, Resources]:
    """Compiles as rwkv_miss/ops/cuda/nvrtc.py does, and reads what ptxas has to say."""
    options = [f"-DHEAD_SIZE={n}", f"-DIO_BF16={TYPES[dtype]}", "--std=c++17", f"--gpu-architecture=sm_{architecture}"]
    headers = sorted((ROOT / "cuda").glob("*.cuh"))
    texts, names = [x.read_bytes() for x in headers], [x.name.encode() for x in headers]
    error, program = nvrtc.nvrtcCreateProgram(
        (ROOT / "cuda" / source).read_bytes(), source.encode(), len(headers), texts, names
    )
    assert error == nvrtc.nvrtcResult.NVRTC_SUCCESS, error
    options = [x.encode() for x in (*options, "--ptxas-options=-v")]
    (error,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    _, size = nvrtc.nvrtcGetProgramLogSize(program)
    buffer = bytes(size + 1)  # written in place
    nvrtc.nvrtcGetProgramLog(program, buffer)
    log = buffer[:size].decode()
    assert error == nvrtc.nvrtcResult.NVRTC_SUCCESS, f"{source} {options}: {error}\n{log}"
    found = {}
    for part in log.split("Compiling ")[1:]:
        name, stack, stores, loads, registers, shared = _REPORT.search(part).groups()
        found[name, n, dtype, architecture] = Resources(
            int(registers), int(stack) + int(stores) + int(loads), int(shared)
        )
    nvrtc.nvrtcDestroyProgram(program)
    return found


def measure_all() -> dict[Key, Resources]:
    """Every combination, in as many processes as there are processors."""
    found: dict[Key, Resources] = {}
    with ProcessPoolExecutor() as pool:
        for part in pool.map(measure, *zip(*product(SOURCES, HEAD_SIZES, TYPES, ARCHITECTURES), strict=True)):
            found |= part
    return found


def threads_of(n: int) -> int:
    return 2 * (n if n <= 64 else 32)


def blocks_per_sm(resources: Resources, threads: int, architecture: int) -> int:
    """How many blocks are in an SM at once. Of its 65,536 registers a thread takes a multiple of 8, and warps come in
    fours; of its shared memory a block takes 1 KB more from compute capability 8.0 on (as NVIDIA's occupancy
    calculator has it)."""
    sm = ARCHITECTURES[architecture]
    warps = -(-threads // 32)
    by_registers = 65536 // (-(-resources.registers // 8) * 8 * 32) // 4 * 4 // warps
    by_shared = sm.shared_kb * 1024 // (resources.shared + (1024 if architecture >= 80 else 0))
    return min(sm.blocks, sm.threads // (32 * warps), by_registers, by_shared)


def rows(found: dict[Key, Resources]) -> list[list[str]]:
    """A row per kernel, head size and type: shared memory, and per architecture registers and blocks per SM."""
    lines = []
    for kernel, n, dtype in sorted({key[:3] for key in found}):
        of = {x: found[kernel, n, dtype, x] for x in ARCHITECTURES}
        shared = sorted({str(x.shared) for x in of.values()})
        cells = [
            f"{x.registers}{f' + {x.local} spilled' if x.local else ''} ({blocks_per_sm(x, threads_of(n), name)})"
            for name, x in of.items()
        ]
        lines.append([kernel, str(n), dtype, "/".join(shared), *cells])
    return lines


def version() -> str:
    _, major, minor = nvrtc.nvrtcVersion()
    return f"{major}.{minor}"


def text(found: dict[Key, Resources]) -> str:
    header = ["kernel", "N", "type", "shared", *(f"sm_{x}" for x in ARCHITECTURES)]
    table = [header, ["---"] * len(header), *rows(found)]
    return f"""# Resources of the CUDA kernels

Written by `python -m tests.simt.resources`, by NVRTC {version()}; tests/simt/test_resources.py compares. Bytes of
static shared memory per block, and per architecture registers per thread and, in brackets, blocks per SM. A block is
2N threads up to N = 64 and 64 above. Nothing spills: that would be an error.

""" + "".join(f"| {' | '.join(row)} |\n" for row in table)


def parse(table: str) -> tuple[str, dict[tuple[str, ...], list[str]]]:
    """The version of NVRTC in what `text` wrote, and its rows by kernel, head size and type."""
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("|")]
    return re.search(r"by NVRTC (\S+);", table)[1], {tuple(row[:3]): row[3:] for row in cells[2:]}


if __name__ == "__main__":
    table = text(measure_all())
    print(table, end="") if "--print" in sys.argv else TABLE.write_text(table)
