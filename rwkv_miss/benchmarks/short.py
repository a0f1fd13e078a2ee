"""The short form: what our parts cost beside rivals that any CPU speeds up or slows down as much, in some seconds, and
whether that is as it was when the figures were committed."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from rwkv_miss.adapters.miss import MissLinear
from rwkv_miss.benchmarks.common import Table, by_turns, ratios, threads
from rwkv_miss.benchmarks.step import Sizes, make_model, products, step_and_products
from rwkv_miss.data.tokenizers import load_tokenizer
from rwkv_miss.errors import RunError, UserError
from rwkv_miss.files import check_is_file
from rwkv_miss.generation.engine import Engine
from rwkv_miss.generation.sampling import Sampling
from rwkv_miss.model.linear import Linear
from rwkv_miss.ops import wkv7
from rwkv_miss.ops.log_probs import target_log_probs

SIZES = Sizes(2, 256, 1024, 128, 16)
ROUNDS = 21
WORSE = 1.5
"""How many times the committed ratio is too much."""
ATTEMPTS = 4
"""How often a ratio that is too much is measured before it counts."""

_Ways = tuple[Callable[[], object], Callable[[], object]]


def bench_short(thread_count: int) -> Table:
    """Each of `CELLS` beside its rival, in fp32, in one thread whatever `thread_count` is. CPU time is measured, which
    other programs hardly change, and both take turns.

    Returns:
        A table with a row for each: name; ratio, the time of ours over the rival's, the median of `ROUNDS`; ratio_min
        and ratio_max.
    """
    return Table(_title(), [_measure(name) for name in CELLS])


def check_short(committed: Path) -> Table:
    """`bench_short`, beside the ratios that `bench --what short --json` wrote to `committed`, in the column committed.

    Raises:
        UserError: there are no such figures.
        RunError: a ratio is more than `WORSE` times the committed one, in each of `ATTEMPTS` measurements.
    """
    before, rows = _committed(committed), []
    for name in CELLS:
        for _ in range(ATTEMPTS):
            row = _measure(name)
            if row["ratio"] <= WORSE * before[name]:
                break
        rows.append(row | {"committed": before[name]})
    if slower := [row for row in rows if row["ratio"] > WORSE * row["committed"]]:
        said = "; ".join(f"{row['name']} takes {row['ratio']:.2f}, it was {row['committed']:.2f}" for row in slower)
        raise RunError(
            f"{committed}: beside the same rivals more than {WORSE} times slower than committed: {said}. Mend it, or, "
            f"if it is meant, commit the new figures: bench --what short --json {committed}"
        )
    return Table(_title(), rows)


def _title() -> str:
    return f"Short form: ratios of CPU time, {ROUNDS} rounds, one thread"


def _measure(name: str) -> dict[str, Any]:
    with threads(1), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ours, rival = CELLS[name]()
        found = by_turns({"ours": ours, "rival": rival}, ROUNDS, time.process_time)
    return {"name": name, **ratios("ratio", found["ours"], found["rival"])}


def _committed(path: Path) -> dict[str, float]:
    """The ratio of each of `CELLS`."""
    check_is_file(path, "file of figures")
    try:
        [table] = json.loads(path.read_text())["tables"]
        found = {row["name"]: float(row["ratio"]) for row in table["rows"]}
    except (ValueError, TypeError, LookupError) as e:
        raise UserError(f"{path}: holds no figures of bench --what short ({type(e).__name__}: {e})") from None
    if missing := CELLS.keys() - found:
        raise UserError(f"{path}: lacks {', '.join(sorted(missing))}; write it anew: bench --what short --json {path}")
    return found


def _step(version: int) -> _Ways:
    ways = step_and_products(version, "fp32", SIZES)
    return ways["step"], ways["products"]


def _wkv7() -> _Ways:
    """18 multiplications for each element of the state and step, and as many in a product of square matrices."""
    n_steps, n_head, head_size = 512, 1, 64
    r, z, k, v, kk, rate, dy = torch.randn(7, 1, n_steps, n_head, head_size)
    kk = normalize(kk, dim=-1)
    inputs = a, b, *_ = [x.requires_grad_() for x in (-kk, kk * torch.sigmoid(rate), r, z, k, v)]
    width = round((18 * n_steps * n_head * head_size**2) ** (1 / 3))
    square = torch.randn(width, width)

    def run() -> None:
        torch.autograd.grad(wkv7(r, z, k, v, a, b, backend="cpu")[0], inputs, dy)

    return run, lambda: torch.mm(square, square)


def _miss() -> _Ways:
    """Our linear with MiSS, and the frozen one alone."""
    width, rank, n_tokens = 512, 32, 512
    linear = Linear(width, width).requires_grad_(False)
    miss = MissLinear(linear, (rank, width), 0.0)
    nn.init.normal_(miss.miss_block, std=0.01)
    x, dy = torch.randn(n_tokens, width, requires_grad=True), torch.randn(n_tokens, width)

    def run(module: nn.Module, wanted: Sequence[Tensor]) -> None:
        torch.autograd.grad(module(x), wanted, dy)

    return partial(run, miss, [x, miss.miss_block]), partial(run, linear, [x])


def _head() -> _Ways:
    """Head and loss with the gradient of a frozen head's input, and the same from all logits."""
    n_tokens, width, vocab_size = 256, 256, 4096
    hidden, weight = torch.randn(1, n_tokens, width, requires_grad=True), torch.randn(vocab_size, width) / width**0.5
    targets = torch.randint(vocab_size, (1, n_tokens))

    def plain() -> None:
        loss = cross_entropy((hidden @ weight.T).flatten(0, 1), targets.flatten(), reduction="sum")
        torch.autograd.grad(loss, hidden)

    return lambda: torch.autograd.grad(target_log_probs(hidden, weight, targets), hidden), plain


def _token() -> _Ways:
    """A token of each of 4 texts by the engine, and the products of that."""
    engine = Engine(make_model(7, "fp32", SIZES), load_tokenizer("bytes"))
    for i in range(4):
        engine.add([i + 1, 7, 8], Sampling(max_tokens=ROUNDS + 5, logit_bias={0: -100}))
    engine.step()
    return engine.step, products(engine.step)


CELLS: dict[str, Callable[[], _Ways]] = {
    "step of RWKV-7 / its products": partial(_step, 7),
    "step of RWKV-6 / its products": partial(_step, 6),
    "WKV-7 / a product of as many multiplications": _wkv7,
    "linear with MiSS / the frozen linear": _miss,
    "head and loss / from all logits": _head,
    "tokens of the engine / their products": _token,
}
"""Ours and a rival, as two functions to time."""
