"""Times our kernels and tokenizer against what else is installed, in one run, after checking that results agree."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import statistics
import sysconfig
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import normalize, softplus

from rwkv_miss.bench_memory import bench_memory
from rwkv_miss.errors import UserError
from rwkv_miss.ops import wkv7

BENCHES = ("wkv7", "tokenizer", "memory", "all")
"""`all` are those that take seconds, not `memory`."""
ROUNDS = 10
TEXT_BYTES = 2_000_000
_PEER_MODULE = "rwkvtune/models/rwkv7/operators/wkv_infctx_naive.py"


def run_bench(what: str, threads: int) -> list[dict]:
    """Runs one of `BENCHES`, prints its tables and returns their rows."""
    if what not in BENCHES:
        raise UserError(f"bench: there is no {what!r}; choose one of {', '.join(BENCHES)}")
    if threads < 1:
        raise UserError(f"bench: threads is {threads}; give at least 1")
    rows = []
    if what == "memory":
        kind = "allocated on the GPU" if torch.cuda.is_available() else "resident"
        title = f"A training step on one row of T tokens: MB {kind} at its peak, above what was before"
        return _print(title, bench_memory(threads))
    if what != "tokenizer":
        title = f"WKV-7, B1 T512 H12 N64 fp32, {threads} thread(s), {ROUNDS} rounds, ms"
        rows += _print(title, bench_wkv7(threads))
    if what != "wkv7":
        rows += _print(f"World tokenizer, encode of {TEXT_BYTES / 1e6:g} MB of text", bench_tokenizer())
    return rows


def bench_wkv7(threads: int, peer: Path | None = None) -> list[dict]:
    """Forward and backward of WKV-7 by our backends and by rwkvtune's `rwkv7_wkv_infctx_naive`.

    Every implementation must first agree with ours to 1e-3 in y and in all gradients. They take turns, so that
    a busy machine slows all of them.

    Args:
        threads: for all of them.
        peer: the file that defines `rwkv7_wkv_infctx_naive`; None looks for an installed rwkvtune.

    Returns:
        A row for each: name; forward_min, forward_median, backward_min, backward_median in ms; ratio, the minima's
        sum over that of our "cpu" backend; note, why there are no figures.
    """
    peer = peer or _installed_file("rwkvtune", _PEER_MODULE)
    with _threads(threads):
        inputs, grad_y = _wkv7_inputs()
        functions = {
            "cpu": lambda *x: wkv7(*x, backend="cpu")[0],
            "torch": lambda *x: wkv7(*x, backend="torch")[0],
        }
        if peer:
            functions["rwkvtune naive"] = _load_peer(peer)
        results = {name: _forward_backward(f, inputs, grad_y)[2] for name, f in functions.items()}
        for name, tensors in results.items():
            for mine, other in zip(results["cpu"], tensors, strict=True):
                assert (mine - other).norm() <= 1e-3 * mine.norm(), f"{name} disagrees with ours"
        times = {name: ([], []) for name in functions}
        for _ in range(ROUNDS):
            for name, f in functions.items():
                for kept, seconds in zip(times[name], _forward_backward(f, inputs, grad_y)[:2], strict=True):
                    kept.append(seconds * 1e3)
    rows = []
    for name, (forward, backward) in times.items():
        row = {"name": name, "forward_min": min(forward), "forward_median": statistics.median(forward)}
        row |= {"backward_min": min(backward), "backward_median": statistics.median(backward)}
        rows.append(row)
    base = rows[0]["forward_min"] + rows[0]["backward_min"]
    for row in rows:
        row |= {"ratio": (row["forward_min"] + row["backward_min"]) / base, "note": ""}
    if not peer:
        rows.append({"name": "rwkvtune naive", "note": "not installed: pip install --no-deps rwkvtune"})
    return rows


def bench_tokenizer() -> list[dict]:
    """MB/s of the World tokenizer: `pyrwkv_tokenizer`, ours, and the Python trie of the `rwkv` package.

    The text is source code of Python's standard library. Both must give the same tokens.

    Returns:
        A row for each: name; mb_per_s, the best of 3; ratio, ours over it; note, why there are no figures.
    """
    from pyrwkv_tokenizer import RWKVTokenizer

    ours = RWKVTokenizer()
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = "".join(p.read_text(encoding="utf-8", errors="replace") for p in sources)[:TEXT_BYTES]
    encoders = {"pyrwkv_tokenizer": ours.encode}
    trie = _installed_file("rwkv", "rwkv/rwkv_tokenizer.py")
    if trie:
        encoders["rwkv (Python trie)"] = _load(trie).TRIE_TOKENIZER(ours.vocab_filepath).encode
    rows, tokens = [], {}
    for name, encode in encoders.items():
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            tokens[name] = list(encode(text))
            seconds.append(time.perf_counter() - start)
        assert tokens[name] == tokens["pyrwkv_tokenizer"], f"{name} gives other tokens than ours"
        speed = len(text.encode()) / min(seconds) / 1e6
        rows.append(
            {"name": name, "mb_per_s": speed, "ratio": (rows[0]["mb_per_s"] if rows else speed) / speed, "note": ""}
        )
    if not trie:
        rows.append({"name": "rwkv (Python trie)", "note": "not installed: pip install rwkv"})
    return rows


def _wkv7_inputs() -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(0)
    r, z, k, v, kk, rate, grad_y = torch.randn(7, 1, 512, 12, 64, generator=generator)
    kk = normalize(kk, dim=-1)
    inputs = [r, z, k, v, -kk, kk * torch.sigmoid(rate)]
    return [x.clone().requires_grad_() for x in inputs], grad_y


def _forward_backward(
    function: Callable[..., Tensor], inputs: list[Tensor], grad_y: Tensor
) -> tuple[float, float, list[Tensor]]:
    start = time.perf_counter()
    y = function(*inputs)
    middle = time.perf_counter()
    grads = torch.autograd.grad(y, inputs, grad_y)
    end = time.perf_counter()
    return middle - start, end - middle, [y.detach(), *grads]


def _load_peer(path: Path) -> Callable[..., Tensor]:
    naive = _load(path).rwkv7_wkv_infctx_naive
    # It takes the w of decay exp(-exp(w)), and k and v before it.
    return lambda r, z, k, v, a, b: naive(r, k, v, -softplus(-z) - 0.5, a, b)[0]


def _installed_file(package: str, path: str) -> Path | None:
    try:
        file = Path(importlib.metadata.distribution(package).locate_file(path))
    except importlib.metadata.PackageNotFoundError:
        return None
    return file if file.exists() else None


def _load(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _print(title: str, rows: list[dict]) -> list[dict]:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = Table(*(column.replace("_", " ") for column in columns), title=title)
    for row in rows:
        cells = (row.get(column, "") for column in columns)
        table.add_row(*(f"{x:.2f}" if isinstance(x, float) else str(x) for x in cells))
    Console().print(table)
    return rows
