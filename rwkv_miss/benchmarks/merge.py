"""Times a merge against a plain copy of the base with its check, and measures its memory."""

from __future__ import annotations

import filecmp
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from rwkv_miss.adapters.files import save_adapter
from rwkv_miss.adapters.inject import inject, trained_parameters
from rwkv_miss.benchmarks.common import Table, apart, resident, threads, write_random_base
from rwkv_miss.config import AdapterConfig
from rwkv_miss.files import flush
from rwkv_miss.merging.merge import merge
from rwkv_miss.model.load import load_model

SIZES = {"0.2B": (12, 768), "0.5B": (24, 1024), "1.5B": (24, 2048)}
"""n_layer and n_embd of each base."""
RANK = 64
ROUNDS = 3


def bench_merge(thread_count: int) -> Table:
    """Merging MiSS into bf16 RWKV-7 bases of random weights, in the folder for temporary files.

    Returns:
        A table with a row for each of `SIZES`: name; gb, the base's size; merge_s and copy_s, the seconds that a merge
        takes, and a copy of the base with its comparison, both until they are on the disk: the smallest of `ROUNDS`, in
        which they take turns; ratio; merge_mb, by how much the memory of a process that merges rises at its peak
        (resident, mapped files included).
    """
    rows = []
    for name, (n_layer, n_embd) in SIZES.items():
        with tempfile.TemporaryDirectory() as folder:
            base = Path(folder) / "base.pth"
            _make(base, Path(folder) / "adapter", n_layer, n_embd)
            merges, copies, rise = [], [], 0
            for _ in range(ROUNDS):
                copies.append(_copy(base, Path(folder) / "copy.pth"))
                seconds, rise = apart(_merge, base, Path(folder) / "adapter", thread_count)
                merges.append(seconds)
            row: dict[str, Any] = {"name": f"RWKV-7 {name}", "gb": base.stat().st_size / 1e9, "merge_s": min(merges)}
            row |= {"copy_s": min(copies), "ratio": min(merges) / min(copies), "merge_mb": rise / 1e6}
            rows.append(row)
    return Table(f"Merging beside a copy and its comparison, {thread_count} thread(s)", rows)


def _make(base: Path, adapter: Path, n_layer: int, n_embd: int) -> None:
    write_random_base(base, n_layer, n_embd)
    flush(base)  # or its way to the disk would slow what is measured
    rng = torch.Generator().manual_seed(0)
    model = inject(load_model(base), AdapterConfig(r=RANK))
    for p in trained_parameters(model).values():
        p.data.uniform_(-0.01, 0.01, generator=rng)
    save_adapter(model, adapter)


def _copy(base: Path, out: Path) -> float:
    start = time.perf_counter()
    shutil.copyfile(base, out)
    flush(out)
    assert filecmp.cmp(base, out, shallow=False)
    seconds = time.perf_counter() - start
    out.unlink()
    return seconds


def _merge(base: Path, adapter: Path, thread_count: int) -> tuple[float, int]:
    """Seconds, and bytes by which this process's resident memory rises."""
    out = base.with_name("out.pth")
    with threads(thread_count):
        before, start = resident("VmRSS"), time.perf_counter()
        merge(base, adapter, out)
        found = time.perf_counter() - start, resident("VmHWM") - before
    out.unlink()
    return found
