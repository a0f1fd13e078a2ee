"""Registers, spills, shared memory and blocks per SM of every kernel, as ptxas reports them. Needs nvcc.

`python tests/simt/resources.py wkv7.cu 64 128` prints the table of docs/kernels.md for those head sizes.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

CUDA = Path(__file__).parents[2] / "cuda"
# Shared memory of an SM in KB (CUDA C++ Programming Guide, technical specifications per compute capability).
SHARED_KB = {75: 64, 80: 164, 86: 100, 89: 100, 90: 228, 100: 228, 120: 100}
_REPORT = re.compile(
    r"entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers"
    r".*?(\d+) bytes smem",
    re.S,
)


def measure(source: str, head_size: int, io_bf16: int, architecture: int) -> dict[str, tuple[int, int, int]]:
    """Kernel name -> registers per thread, bytes of spills, bytes of static shared memory per block."""
    options = [f"-DHEAD_SIZE={head_size}", f"-DIO_BF16={io_bf16}", f"-arch=sm_{architecture}", "-std=c++17"]
    command = ["nvcc", "-cubin", "-Xptxas", "-v", *options, str(CUDA / source), "-o", "/dev/null"]
    log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    found = [_REPORT.search(part) for part in log.split("Compiling ")[1:]]
    return {m[1]: (int(m[4]), int(m[2]) + int(m[3]), int(m[5])) for m in found if m}


def blocks_per_sm(registers: int, shared: int, threads: int, architecture: int) -> int:
    """How many blocks fit in an SM by registers (65,536, given out by 8 per thread) and by shared memory (of which
    each block takes 1 KB more from compute capability 8.0 on). threads: a multiple of 32."""
    by_registers = 65536 // (-(-registers // 8) * 8 * threads)
    return min(by_registers, SHARED_KB[architecture] * 1024 // (shared + (1024 if architecture >= 80 else 0)))


def cells(source: str, head_size: int, io_bf16: int, architecture: int) -> dict[str, str]:
    """Kernel name -> registers, a / and spilled bytes if any, and in brackets blocks per SM."""
    threads = max(32, 2 * (head_size if head_size <= 64 else 32))
    found = {}
    for kernel, (registers, spills, shared) in measure(source, head_size, io_bf16, architecture).items():
        blocks = blocks_per_sm(registers, shared, threads, architecture)
        found[kernel] = f"{registers}{f'/{spills}' if spills else ''} ({blocks})"
    return found


def table(source: str, head_sizes: list[int]) -> str:
    """A row per kernel, head size and type; a column per architecture."""
    header = ["kernel", "N", "type", *(f"sm_{x}" for x in SHARED_KB)]
    lines = [f"| {' | '.join(header)} |", "|" + " --- |" * len(header)]
    for n in head_sizes:
        for io_bf16, name in ((1, "bf16"), (0, "fp32")):
            columns = [cells(source, n, io_bf16, x) for x in SHARED_KB]
            for kernel in sorted(columns[0]):
                lines.append(f"| {kernel} | {n} | {name} | {' | '.join(x[kernel] for x in columns)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(sys.argv[1], [int(x) for x in sys.argv[2:]]))
