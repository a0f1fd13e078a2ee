"""Times the engine beside the `rwkv` package, after checking that logits agree."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rwkv_miss.benchmarks.common import Table, apart, by_turns, ratios, threads, write_random_base
from rwkv_miss.data.tokenizers import load_tokenizer
from rwkv_miss.generation.engine import Engine
from rwkv_miss.generation.sampling import Sampling
from rwkv_miss.model.base import RWKV
from rwkv_miss.model.load import load_model

SIZES = (12, 768)
"""n_layer and n_embd of the base: those of 0.1B."""
BATCH = 32
PROMPT = 2048
ROUNDS, PROMPT_ROUNDS = 15, 7
_TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2}


def bench_generate(thread_count: int) -> Table:
    """Tokens per second on a CPU, on an RWKV-7 of random weights with the World vocabulary, each dtype in a process of
    its own, in which all ways take turns: the likeliest token of each text at a time, or a prompt. The package has no
    batches, so that a batch is compared with one of our own.

    Returns:
        A table with a row for each dtype and way: name; tokens_per_s, by the median of `ROUNDS` or, of prompts,
        `PROMPT_ROUNDS`; beside, what it is compared with; its_tokens_per_s; ratio, how many times the speed of that, in
        the median of the rounds, ratio_min and ratio_max; goal, the least ratio; note, why there is no ratio.
    """
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base.pth"
        write_random_base(base, *SIZES)
        sizes = BATCH, PROMPT, ROUNDS, PROMPT_ROUNDS
        rows = [row for dtype in _TOLERANCE for row in apart(_rows, base, dtype, thread_count, *sizes)]
    n_layer, n_embd = SIZES
    return Table(f"Generating: RWKV-7, {n_layer} layers of {n_embd}, {ROUNDS} rounds, {thread_count} thread(s)", rows)


def _rows(
    base: Path, dtype: str, thread_count: int, batch_size: int, length: int, rounds: int, prompt_rounds: int
) -> list[dict[str, Any]]:
    with threads(thread_count), torch.no_grad():
        model = load_model(base, dtype).eval()
        prompt = torch.randint(1, model.config.vocab_size, (length,), generator=torch.Generator().manual_seed(0))
        package = _package(base, dtype) if importlib.util.find_spec("rwkv") else None

        def prefill() -> None:
            engine = Engine(model, load_tokenizer("world"))
            engine.add(prompt.tolist(), Sampling(temperature=0, max_tokens=1))
            engine.step()

        decode: dict[str, Callable[[], object]] = {
            "one": _decoder(model, 1, rounds),
            "batch": _decoder(model, batch_size, rounds),
        }
        read: dict[str, Callable[[], object]] = {"prompt": prefill}
        if package:
            ours, theirs = model(prompt[None, :64])[0][0, -1].float(), package(prompt[:64].tolist(), None)[0].float()
            difference = (ours - theirs).norm() / theirs.norm()
            assert difference <= _TOLERANCE[dtype], f"the package's logits disagree: {difference:.1e}"
            state = package([1], None)[1]
            decode["package"] = lambda: int(package([7], state)[0].argmax())
            read["package"] = lambda: package(prompt.tolist(), None)
        decoded, were_read = by_turns(decode, rounds), by_turns(read, prompt_rounds)
    one, batch, package_read = decoded["one"], decoded["batch"], were_read.get("package")
    return [
        _row(f"{dtype} decode", 1, one, "rwkv package", 1, decoded.get("package"), 1.0),
        _row(f"{dtype} decode, batch of {batch_size}", batch_size, batch, "batch of 1", 1, one, 8.0),
        _row(f"{dtype} prompt of {length}", length, were_read["prompt"], "rwkv package", length, package_read, 5.0),
    ]


def _row(
    name: str, tokens: int, seconds: list[float], beside: str, its_tokens: int, its: list[float] | None, goal: float
) -> dict[str, Any]:
    row: dict[str, Any] = {"name": name, "tokens_per_s": tokens / statistics.median(seconds), "beside": beside}
    if its is None:
        return row | {"goal": goal, "note": "not installed: pip install rwkv"}
    row |= {"its_tokens_per_s": its_tokens / statistics.median(its)}
    return row | ratios("ratio", [tokens / s for s in seconds], [its_tokens / s for s in its]) | {"goal": goal}


def _decoder(model: RWKV, count: int, steps: int) -> Callable[[], object]:
    """A step of an engine whose `count` members have read their prompts and do not end."""
    engine = Engine(model, load_tokenizer("world"))
    for i in range(count):
        engine.add([100 + i, 7, 8], Sampling(temperature=0, max_tokens=steps + 3, logit_bias={0: -100}))
    engine.step()
    return engine.step


def _package(base: Path, dtype: str) -> Callable[[list[int], Any], tuple[Tensor, Any]]:
    """The package's `forward(ids, state)`, in its fastest way on a CPU. It reads its settings from the environment when
    it is imported, and prints while it loads."""
    os.environ.update(RWKV_V7_ON="1", RWKV_JIT_ON="1")
    with contextlib.redirect_stdout(io.StringIO()):
        from rwkv.model import RWKV

        model = RWKV(model=str(base.with_suffix("")), strategy=f"cpu {dtype}")
    return model.forward
