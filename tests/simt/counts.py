"""What a chunk of 16 steps of a head costs in cuda/wkv7_chunk.cu, forward and backward at N = 64, and which unit of a
GPU bounds it: instructions as ptxas makes them (nvdisasm shows them), wavefronts of shared memory as the emulator
counts them.

`pip install nvidia-cuda-nvdisasm; python -m tests.simt.counts` writes docs/kernels_counts.md; with `--print` it prints
the text instead. It needs no GPU.
"""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from rwkv_miss.ops.cuda.nvrtc import compile_source
from rwkv_miss.ops.cuda.programs import PROGRAMS
from rwkv_miss.ops.cuda.wkv import CHUNK_SAVE_EVERY, SAVE_EVERY
from tests.ops.cases import WKV7
from tests.simt import banks
from tests.simt.harness import build_once
from tests.simt.resources import version
from tests.simt.wkv import BF16, run_chunk

TABLE = Path(__file__).parents[2] / "docs" / "kernels_counts.md"
PROGRAM, N, CHUNK, WARPS = PROGRAMS["wkv7_chunk"], 64, SAVE_EVERY, 4
CHUNKS = 8 * 64 * 4096 // CHUNK  # of all heads at B8 H64 T4096
BYTES = 2816  # a token and head: kernels.md
# The rows of the table, and which instructions they count: by the first word of nvdisasm's name.
INSTRUCTIONS = {
    "mma": ("HMMA",),
    "ldmatrix": ("LDSM",),
    "loads from shared memory": ("LDS",),
    "stores to shared memory": ("STS",),
    "cp.async": ("LDGSTS",),
    "special functions": ("MUFU",),
    "shuffles and movmatrix": ("SHFL", "MOVM"),
}


@dataclass(frozen=True)
class Gpu:
    """What the data sheets and whitepapers of NVIDIA say: the architecture, SMs, boost clock in GHz, dense bf16 TFLOP/s
    with fp32 sums, and memory in TB/s."""

    architecture: int
    sms: int
    clock: float
    tflops: float
    bandwidth: float

    def ms(self, cycles: float) -> float:
        """How long so many cycles of an SM for each chunk take."""
        return cycles * CHUNKS / self.sms / self.clock / 1e6

    def bounds(self, count: Counter[str], wavefronts: float) -> dict[str, float]:
        """The ms that each unit needs at least. An SM gives or takes 32 words of shared memory, computes 16 special
        functions and issues 4 instructions of warps in a cycle (CUDA C++ Programming Guide, for 8.0 to 9.0)."""
        return {
            "tensor cores": count["mma"] * 2 * 16 * 8 * 16 * CHUNKS / self.tflops / 1e9,
            "shared memory": self.ms(wavefronts),
            "special functions": self.ms(count["special functions"] * 32 / 16),
            "issuing instructions": self.ms(count["all"] / 4),
            "memory": BYTES * CHUNK * CHUNKS / self.bandwidth / 1e9,
        }


GPUS = {
    "H100 SXM": Gpu(90, 132, 1.83, 989.4, 3.35),
    "H200": Gpu(90, 132, 1.83, 989.4, 4.8),
    "A100 80GB SXM": Gpu(80, 108, 1.41, 312, 2.04),
    "RTX 4090": Gpu(89, 128, 2.52, 165.2, 1.01),
}


def disassembler() -> str | None:
    """The path of nvdisasm: on the PATH, or from its wheel."""
    try:
        files = importlib.metadata.files("nvidia-cuda-nvdisasm") or []
    except importlib.metadata.PackageNotFoundError:
        return shutil.which("nvdisasm")
    return next(str(x.locate()) for x in files if x.name == "nvdisasm")


def loops(architecture: int) -> dict[str, list[Counter[str]]]:
    """By kernel, the instructions of its loops over pieces, the outer ones first, without those of the loops inside. A
    loop without `ldmatrix` is none over pieces."""
    command = disassembler()
    assert command, "there is no nvdisasm; pip install nvidia-cuda-nvdisasm"
    code = compile_source(PROGRAM.source, PROGRAM.variants[BF16, N], divmod(architecture, 10))
    with TemporaryDirectory() as folder:
        path = Path(folder) / "kernels.cubin"
        path.write_bytes(code)
        text = subprocess.run([command, "-c", path], capture_output=True, text=True, check=True).stdout
    found = {}
    for part in re.split(r"^//-+ \.text\.", text, flags=re.M)[1:]:
        found[part.split()[0]] = loops_over_pieces(part.splitlines())
    return found


def loops_over_pieces(lines: list[str]) -> list[Counter[str]]:
    """The same for the lines that nvdisasm writes for a kernel."""
    labels: dict[str, int] = {}
    instructions: list[str] = []
    for line in lines:
        if label := re.match(r"(\.L_\w+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.match(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?(\S.*?)\s*;", line):
            instructions.append(instruction[1])
    ranges: dict[int, int] = {}  # from the label of a loop to its last jump back
    for i, instruction in enumerate(instructions):
        target = re.search(r"\bBRA\b.*`\((\.L_\w+)\)", instruction)
        if target and labels[target[1]] <= i:
            ranges[labels[target[1]]] = i
    found: list[tuple[int, int, Counter[str]]] = []
    for first, last in sorted(ranges.items(), reverse=True):  # inner loops before those around them
        names = Counter(re.split(r"[.\s]", x)[0] for x in instructions[first : last + 1])
        count = Counter({row: sum(names[x] for x in of) for row, of in INSTRUCTIONS.items()})
        count["all"] = last + 1 - first
        for begin, end, inside in found:
            if first <= begin and end <= last:
                count.subtract(inside)
        if names["LDSM"]:
            found.append((first, last, count))
    return [count for _, _, count in reversed(found)]


def per_chunk(architecture: int) -> Counter[str]:
    """Instructions of all warps for a chunk that is one piece, forward and backward. Every warp goes through every loop
    once a piece; a segment's pieces but its last are replayed. Where warps branch, all branches are counted."""
    found = loops(architecture)
    (forward,) = found["wkv7_chunk_forward"]
    backward, replay = found["wkv7_chunk_backward"]
    pieces = CHUNK_SAVE_EVERY // CHUNK
    once, again = WARPS, WARPS * (pieces - 1) / pieces
    return Counter({x: round(once * (forward[x] + backward[x]) + again * replay[x]) for x in forward})


def wavefronts() -> tuple[float, float]:
    """Instructions that access shared memory and wavefronts that they take, of all warps for a chunk that is one piece,
    forward and backward, by the emulator."""
    library = build_once(PROGRAM.source, *PROGRAM.variants[BF16, N], *banks.OPTIONS)
    inputs, state = WKV7.make_inputs(2 * CHUNK_SAVE_EVERY, N, BF16, 1, 1)
    run_chunk(library, inputs, state, None, WKV7.make_weights(inputs, state), 0)
    places, chunks = banks.places(library), 2 * CHUNK_SAVE_EVERY // CHUNK
    return sum(x.instructions for x in places) / chunks, sum(x.wavefronts for x in places) / chunks


def text() -> str:
    """The text of docs/kernels_counts.md."""
    architectures = sorted({x.architecture for x in GPUS.values()})
    counts = {x: per_chunk(x) for x in architectures}
    accesses, waves = wavefronts()
    lines = [["instructions", *(f"sm_{x}" for x in architectures)], ["---"] * (1 + len(architectures))]
    lines += [[row, *(str(counts[x][row]) for x in architectures)] for row in (*INSTRUCTIONS, "all")]
    bounds = {name: gpu.bounds(counts[gpu.architecture], waves) for name, gpu in GPUS.items()}
    times = [["ms at least", *GPUS], ["---", *["--:"] * len(GPUS)]]
    for unit in next(iter(bounds.values())):
        of = {name: f"{x[unit]:.1f}" for name, x in bounds.items()}
        times.append([unit, *(f"**{of[x]}**" if bounds[x][unit] == max(bounds[x].values()) else of[x] for x in GPUS)])
    return f"""# Counts of WKV-7 on tensor cores

Written by `python -m tests.simt.counts`, by NVRTC {version()}; tests/simt/test_counts.py compares. For a chunk of 16
steps of a head that is one piece, N = 64, forward and backward with its replay: the instructions of all warps in the
code of the loops over pieces. Where warps branch (each of a piece's matrices is one warp's work), all branches are
counted, so that loads, stores and the sum of all are somewhat too high.

{_table(lines)}
The emulator, which counts what runs, finds {accesses:.0f} instructions that access shared memory, and {waves:.0f}
wavefronts that they take.

What each unit needs at least for B8 H64 T4096 ({BYTES:,} bytes a token and head), with the clocks and rates of the data
sheets; the bound is the largest number of a column:

{_table(times)}"""


def _table(rows: list[list[str]]) -> str:
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


if __name__ == "__main__":
    print(text(), end="") if "--print" in sys.argv else TABLE.write_text(text())
