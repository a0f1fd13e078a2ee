"""Times our WKV-7 kernels against rwkvtune's, after checking that results agree."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize, softplus

from rwkv_miss.benchmarks.common import Table, installed_file, load_file, threads
from rwkv_miss.ops import wkv7

ROUNDS = 10
_SHAPE = B, T, H, N = 1, 512, 12, 64
# Multiplications with an addition for each step, key and value, where steps are taken one by one. Forward: decay,
# u b^T, v k^T, y, u of the next step.
# Backward: the first four again, two sums for the gradients of u and v, three for the state's, four for d, k, a and b.
_FORWARD, _BACKWARD = 5, 13
_PEER_MODULE = "rwkvtune/models/rwkv7/operators/wkv_infctx_naive.py"


def bench_wkv7(thread_count: int, peer: Path | None = None) -> Table:
    """Forward and backward of WKV-7 by our backends and by rwkvtune's `rwkv7_wkv_infctx_naive`.

    Every implementation must first agree with ours to 1e-3 in y and in all gradients. They take turns, so that
    a busy machine slows all of them.

    Args:
        thread_count: CPU threads of every implementation.
        peer: the file that defines `rwkv7_wkv_infctx_naive`; None looks for an installed rwkvtune.

    Returns:
        A table with a row for each, and one for the limit: what its multiplications alone would take at the speed of a
        product of fp32 matrices of 1,024 x 1,024, measured in the same rounds. name; forward_min, forward_median,
        backward_min, backward_median in ms; ratio, the minima's sum over that of our "cpu" backend; note, why there
        are no figures.
    """
    peer = peer or installed_file("rwkvtune", _PEER_MODULE)
    with threads(thread_count):
        inputs, grad_y = _wkv7_inputs()
        functions: dict[str, Callable[..., Tensor]] = {
            name: lambda r, z, k, v, a, b, name=name: wkv7(r, z, k, v, a, b, backend=name)[0]
            for name in ("cpu", "torch")
        }
        if peer:
            functions["rwkvtune naive"] = _load_peer(peer)
        results = {name: _forward_backward(f, inputs, grad_y)[2] for name, f in functions.items()}
        for name, tensors in results.items():
            for mine, other in zip(results["cpu"], tensors, strict=True):
                assert (mine - other).norm() <= 1e-3 * mine.norm(), f"{name} disagrees with ours"
        times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in functions}
        times["limit"] = ([], [])
        for _ in range(ROUNDS):
            unit = B * T * H * N**2 / _multiply_adds_per_ms()
            for kept, count in zip(times["limit"], (_FORWARD, _BACKWARD), strict=True):
                kept.append(count * unit)
            for name, f in functions.items():
                for kept, seconds in zip(times[name], _forward_backward(f, inputs, grad_y)[:2], strict=True):
                    kept.append(seconds * 1e3)
    rows: list[dict[str, Any]] = []
    for name, (forward, backward) in times.items():
        row: dict[str, Any] = {"name": name, "forward_min": min(forward), "forward_median": statistics.median(forward)}
        row |= {"backward_min": min(backward), "backward_median": statistics.median(backward)}
        rows.append(row)
    base = rows[0]["forward_min"] + rows[0]["backward_min"]
    for measured in rows:
        total = measured["forward_min"] + measured["backward_min"]
        measured |= {"ratio": total / base, "note": ""}
    if not peer:
        rows.append({"name": "rwkvtune naive", "note": "not installed: pip install --no-deps rwkvtune"})
    return Table(f"WKV-7, B{B} T{T} H{H} N{N} fp32, {thread_count} thread(s), {ROUNDS} rounds, ms", rows)


def _multiply_adds_per_ms() -> float:
    x = torch.ones(1024, 1024)
    torch.mm(x, x)  # starts the threads
    start = time.perf_counter()
    torch.mm(x, x)
    return 1024**3 / ((time.perf_counter() - start) * 1e3)


def _wkv7_inputs() -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(0)
    r, z, k, v, kk, rate, grad_y = torch.randn(7, *_SHAPE, generator=generator)
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
    naive = load_file(path).rwkv7_wkv_infctx_naive
    # It takes the w of decay exp(-exp(w)) instead of z, and takes it after k and v.
    return lambda r, z, k, v, a, b: naive(r, k, v, -softplus(-z) - 0.5, a, b)[0]
