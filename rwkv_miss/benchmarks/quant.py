"""Measures the memory of quantised bases."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from rwkv_miss.adapters.inject import inject
from rwkv_miss.benchmarks.common import Table, apart, resident, threads, write_random_base
from rwkv_miss.config import QUANTS, AdapterConfig
from rwkv_miss.model.load import load_model
from rwkv_miss.model.quantised import unusable

SIZES = {"0.1B": (12, 768), "1.5B": (24, 2048)}
"""n_layer and n_embd of each base."""
LENGTH = 32


def bench_quant(thread_count: int) -> Table:
    """Loading bf16 RWKV-7 bases of random weights, which are written to the folder for temporary files, and a training
    step of MiSS (r 64) on `LENGTH` tokens, on the CPU, each in a process of its own.

    Returns:
        A table with a row for each of `SIZES` and of `QUANTS`: name; quant; weights_mb, the bytes of the model's
        weights; load_s; load_mb and step_mb, by how much the memory of the process rises at its peak until the base is
        loaded, and until the step is done (resident, mapped files included).
    """
    rows = []
    for name, (n_layer, n_embd) in SIZES.items():
        with tempfile.TemporaryDirectory() as folder:
            base = Path(folder) / "base.pth"
            write_random_base(base, n_layer, n_embd)
            for quant in QUANTS:
                found = apart(_measure, base, quant, thread_count)
                rows.append({"name": f"RWKV-7 {name}", "quant": quant, **found})
    return Table(f"The memory of a base, {thread_count} thread(s)", rows)


def _measure(base: Path, quant: str, thread_count: int) -> dict[str, Any]:
    with threads(thread_count):
        unusable("int8", torch.float32, torch.device("cpu"))  # imports bitsandbytes, which is not measured
        before, start = resident("VmRSS"), time.perf_counter()
        model = load_model(base, quant=quant)
        seconds, load = time.perf_counter() - start, resident("VmHWM") - before
        weights = sum(x.nbytes for x in (*model.parameters(), *model.buffers()))
        inject(model, AdapterConfig(r=64))
        tokens = torch.arange(LENGTH).view(1, -1)
        model(tokens)[0].float().square().mean().backward()
        step = resident("VmHWM") - before
    return {"weights_mb": weights / 1e6, "load_s": seconds, "load_mb": load / 1e6, "step_mb": step / 1e6}
