"""Times a batch of requests with adapters of their own beside batches with one adapter, and beside one request."""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rwkv_miss.adapters.files import load_adapter, save_adapter
from rwkv_miss.adapters.inject import DEFAULT, inject, trained_parameters
from rwkv_miss.adapters.several import set_adapter
from rwkv_miss.benchmarks.common import Table, threads, write_random_base
from rwkv_miss.config import AdapterConfig
from rwkv_miss.data.tokenizers import load_tokenizer
from rwkv_miss.generation.engine import Engine
from rwkv_miss.generation.sampling import Sampling
from rwkv_miss.model.load import load_model

SIZES = (12, 768)
"""n_layer and n_embd of the base: those of 0.1B."""
REQUESTS = 32
RANK = 32
ROUNDS = 15
_DTYPES = ("fp32", "bf16")


def bench_serving(thread_count: int) -> Table:
    """Tokens per second of the engine on the CPU, on an RWKV-7 of random weights with the World vocabulary and MiSS
    adapters beside every linear, all in one process. The batches take turns, a token of each of their members at a
    time, so that a busy machine slows all of them.

    Returns:
        A table with a row for each dtype and batch: dtype; batch; tokens_per_s, by the median of `ROUNDS` steps;
        beside_one_adapter, the median of the rounds' ratios to the batch whose members all have the same adapter. The
        batch of one request is the way without batching, whatever its adapter.
    """
    rows = []
    with threads(thread_count), torch.random.fork_rng(devices=[]), tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        torch.manual_seed(0)
        write_random_base(folder / "base.pth", *SIZES)
        names = [str(i) for i in range(REQUESTS)]
        adapted = inject(load_model(folder / "base.pth"), AdapterConfig(r=RANK))
        for name in names:
            for D in trained_parameters(adapted).values():
                nn.init.normal_(D, std=0.01)
            save_adapter(adapted, folder / name)
        del adapted
        for dtype in _DTYPES:
            rows += _rows(folder, names, dtype)
    n_layer, n_embd = SIZES
    title = f"Serving: {n_layer} layers of {n_embd}, r = {RANK}, {ROUNDS} rounds, {thread_count} thread(s)"
    return Table(title, rows)


def _rows(folder: Path, names: list[str], dtype: str) -> list[dict[str, Any]]:
    model = load_model(folder / "base.pth", dtype).eval()
    merged = load_adapter(load_model(folder / "base.pth", dtype).eval(), folder / names[0])
    set_adapter(merged, DEFAULT, merged=True)
    batches: dict[str, tuple[Any, list[str | None]]] = {
        "one adapter": (model, [names[0]] * len(names)),
        f"{len(names)} adapters": (model, list(names)),
        "one adapter, merged": (merged, [None] * len(names)),
        "base": (model, [None] * len(names)),
        "one request": (model, [names[0]]),
    }
    engines = {}
    for batch, (its_model, adapters) in batches.items():
        engines[batch] = engine = Engine(its_model, load_tokenizer("world"))
        for name in dict.fromkeys(adapters):
            if name is not None:
                engine.adapters.add(name, folder / name)
        for i, name in enumerate(adapters):
            engine.add([100 + i, 7, 8], Sampling(max_tokens=ROUNDS + 3), adapter=name)
    seconds: dict[str, list[float]] = {batch: [] for batch in engines}
    for i in range(ROUNDS + 2):
        for batch, engine in engines.items():
            start = time.perf_counter()
            engine.step()
            if i > 1:  # the first step reads the prompts, the second warms up
                seconds[batch].append(time.perf_counter() - start)
    found = []
    for batch, (_, adapters) in batches.items():
        rate = [len(adapters) / x for x in seconds[batch]]
        one = [len(names) / x for x in seconds["one adapter"]]
        ratio = statistics.median(a / b for a, b in zip(rate, one, strict=True))
        found.append(
            {"dtype": dtype, "batch": batch, "tokens_per_s": statistics.median(rate), "beside_one_adapter": ratio}
        )
    return found
