"""Times the head with the loss, forward and backward, against computing all logits, and measures the memory of both."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rwkv_miss.benchmarks.common import Table, apart, peak_bytes, ratios, threads
from rwkv_miss.ops.log_probs import target_log_probs

TOKENS, N_EMBD, VOCAB_SIZE = 4096, 768, 65536
ROUNDS = 7
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_TOLERANCE = {torch.bfloat16: 1e-2, torch.float32: 1e-5}


def bench_head(thread_count: int) -> Table:
    """The cross entropy of `TOKENS` targets and its gradients: by `target_log_probs`, and as PyTorch's documentation
    has it, from all logits in fp32. Loss and gradients must first agree. Both take turns.

    Returns:
        A table with a row for each dtype, with a head that is frozen or trained: name; plain_ms, the median of
        `ROUNDS`; ratio, the median of the rounds' ratios to that, ratio_min and ratio_max; plain_mb and mb, the memory
        at the peak, each in a process of its own; memory_ratio.
    """
    rows = []
    for name in _DTYPES:
        for trained in (False, True):
            sizes = TOKENS, VOCAB_SIZE
            with threads(thread_count):
                row = _times(name, trained, *sizes)
            for way, column in {"plain": "plain_mb", "ours": "mb"}.items():
                row[column] = apart(_peak, way, name, trained, *sizes) / 1e6
            rows.append(row | {"memory_ratio": row["mb"] / row["plain_mb"]})
    return Table(f"Head and loss, {TOKENS} tokens, {N_EMBD} wide, vocabulary {VOCAB_SIZE}, {ROUNDS} rounds", rows)


def _plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return -F.cross_entropy(F.linear(hidden, weight).float().flatten(0, 1), targets.flatten(), reduction="sum")


_WAYS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"plain": _plain, "ours": target_log_probs}


def _run(way: str, hidden: Tensor, weight: Tensor, targets: Tensor) -> list[Tensor]:
    """The loss, and its gradients."""
    loss = -_WAYS[way](hidden, weight, targets) / targets.numel()
    wanted = [x for x in (hidden, weight) if x.requires_grad]
    return [loss.detach(), *torch.autograd.grad(loss, wanted)]


def _inputs(name: str, trained: bool, tokens: int, vocab_size: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    hidden = torch.randn(1, tokens, N_EMBD, generator=generator).to(device, _DTYPES[name]).requires_grad_()
    weight = torch.randn(vocab_size, N_EMBD, generator=generator).to(device, _DTYPES[name]) / N_EMBD**0.5
    targets = torch.randint(vocab_size, (1, tokens), generator=generator).to(device)
    return hidden, weight.requires_grad_(trained), targets


def _times(name: str, trained: bool, tokens: int, vocab_size: int) -> dict[str, Any]:
    inputs = _inputs(name, trained, tokens, vocab_size)
    for mine, other in zip(*(_run(way, *inputs) for way in _WAYS), strict=True):
        assert (mine - other).norm() <= _TOLERANCE[_DTYPES[name]] * other.norm(), "the results disagree"
    times: dict[str, list[float]] = {way: [] for way in _WAYS}
    for _ in range(ROUNDS):
        for way in _WAYS:
            start = time.perf_counter()
            _run(way, *inputs)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times[way].append(time.perf_counter() - start)
    return {
        "name": f"{name}, head {'trained' if trained else 'frozen'}",
        "plain_ms": statistics.median(times["plain"]) * 1e3,
        **ratios("ratio", times["ours"], times["plain"]),
    }


def _peak(way: str, name: str, trained: bool, tokens: int, vocab_size: int) -> int:
    hidden, weight, targets = _inputs(name, trained, tokens, vocab_size)
    _run(way, hidden[:, :1], weight, targets[:, :1])  # what the libraries keep for themselves
    return peak_bytes(lambda: _run(way, hidden, weight, targets))
