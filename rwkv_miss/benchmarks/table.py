"""The table of the benchmarks."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from rwkv_miss.benchmarks.common import Table
from rwkv_miss.benchmarks.data import bench_data
from rwkv_miss.benchmarks.fits import bench_fits
from rwkv_miss.benchmarks.generate import bench_generate
from rwkv_miss.benchmarks.head import bench_head
from rwkv_miss.benchmarks.launches import bench_launches
from rwkv_miss.benchmarks.memory import bench_memory
from rwkv_miss.benchmarks.merge import bench_merge
from rwkv_miss.benchmarks.methods import bench_methods
from rwkv_miss.benchmarks.miss import bench_miss
from rwkv_miss.benchmarks.packing import bench_packing
from rwkv_miss.benchmarks.quant import bench_quant
from rwkv_miss.benchmarks.serving import bench_serving
from rwkv_miss.benchmarks.short import bench_short
from rwkv_miss.benchmarks.start import bench_start
from rwkv_miss.benchmarks.step import bench_step
from rwkv_miss.benchmarks.tokenizer import bench_tokenizer
from rwkv_miss.benchmarks.wkv7 import bench_wkv7
from rwkv_miss.doctor import machine
from rwkv_miss.errors import UserError
from rwkv_miss.files import atomic_write


class Benchmark(NamedTuple):
    """run: (CPU threads) -> its table. takes_seconds: whether it is over in seconds, so that `all` includes it."""

    run: Callable[[int], Table]
    takes_seconds: bool


BENCHMARKS: dict[str, Benchmark] = {
    "wkv7": Benchmark(bench_wkv7, True),
    "tokenizer": Benchmark(bench_tokenizer, True),
    "miss": Benchmark(bench_miss, False),
    "head": Benchmark(bench_head, False),
    "memory": Benchmark(bench_memory, False),
    "merge": Benchmark(bench_merge, False),
    "data": Benchmark(bench_data, False),
    "methods": Benchmark(bench_methods, False),
    "quant": Benchmark(bench_quant, False),
    "serving": Benchmark(bench_serving, False),
    "step": Benchmark(bench_step, False),
    "packing": Benchmark(bench_packing, False),
    "generate": Benchmark(bench_generate, False),
    "start": Benchmark(bench_start, False),
    "short": Benchmark(bench_short, False),
    "launches": Benchmark(bench_launches, False),
    "fits": Benchmark(bench_fits, False),
}


def run_benchmarks(what: str, threads: int) -> Iterator[Table]:
    """The tables of one of `BENCHMARKS`, or of all of those that take seconds, each as soon as it is there.

    Raises:
        UserError: there is no such benchmark, or threads is below 1.
    """
    if what not in (*BENCHMARKS, "all"):
        raise UserError(f"bench: there is no {what!r}; choose one of {', '.join(BENCHMARKS)}, all")
    if threads < 1:
        raise UserError(f"bench: threads is {threads}; give at least 1")
    for name, benchmark in BENCHMARKS.items():
        if what == name or (what == "all" and benchmark.takes_seconds):
            yield benchmark.run(threads)


def write_figures(path: Path, threads: int, tables: Sequence[Table]) -> None:
    """Writes tables as JSON, with the machine on which they were measured.

    Raises:
        UserError: the file cannot be written.
    """
    figures = {"machine": dict(machine()), "threads": threads, "tables": [table._asdict() for table in tables]}
    with atomic_write(path) as part:
        part.write_text(json.dumps(figures, indent=2) + "\n")
