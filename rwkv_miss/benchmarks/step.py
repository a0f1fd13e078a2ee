"""Times a training step of MiSS beside its matrix products alone, and beside rwkv7-hf with HF PEFT's MiSS, and measures
the memory of both."""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rwkv_miss.adapters.inject import inject, trained_parameters
from rwkv_miss.benchmarks.common import Table, apart, by_turns, peak_bytes, ratios, threads
from rwkv_miss.benchmarks.hf_step import make_peer, peer_step
from rwkv_miss.config import AdapterConfig
from rwkv_miss.model.base import RWKV
from rwkv_miss.model.init import new_config
from rwkv_miss.model.log_probs import batch_log_probs
from rwkv_miss.model.versions import MODELS


class Sizes(NamedTuple):
    n_layer: int
    n_embd: int
    vocab_size: int
    tokens: int
    rank: int


SIZES = Sizes(12, 768, 65536, 512, 32)
"""Those of 0.1B, and one row."""
ROUNDS, PEER_ROUNDS = 7, 3
# At most so many times the products' time; at least so many times faster than the peer, in at most this part of memory.
_GOALS = {(7, "bf16"): 1.3, (7, "fp32"): 1.2, (6, "bf16"): 1.4, (6, "fp32"): 1.4}
_PEER_GOALS = {"peer_ratio_goal": 10, "memory_goal": 0.25}
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_TOLERANCE = {"bf16": 5e-2, "fp32": 1e-4}
_PRODUCTS = {getattr(torch.ops.aten, name) for name in ("mm", "bmm", "addmm", "addmm_", "baddbmm", "baddbmm_")}


def bench_step(thread_count: int) -> Table:
    """A step of MiSS beside every linear, on a CPU: forward and backward pass, without gradient clipping and optimizer,
    on a model of random weights. All ways take turns; loss and gradients of D must first agree with the peer's.

    Returns:
        A table with a row for each version and dtype: name; step_s and products_s, the medians of `ROUNDS`, the latter
        of the step's matrix products alone, with random factors of the same shapes, strides and dtypes; ratio, the
        median of the rounds' ratios, ratio_min, ratio_max and its goal; and, for RWKV-7, of rwkv7-hf with HF PEFT's
        MiSS on the same weights: peer_s, the median of `PEER_ROUNDS`; peer_ratio, how many times longer it takes, in
        the median of the rounds; step_mb and peer_mb, the memory at the peak above the weights, each in a process of
        its own; memory_ratio; and the goals of both ratios; note, why there are no figures of it.
    """
    installed = all(map(importlib.util.find_spec, ("rwkv7_hf", "peft")))
    rows = []
    for (version, dtype), goal in _GOALS.items():
        row = {"name": f"RWKV-{version} {dtype}", **apart(_times, version, dtype, SIZES, thread_count, ROUNDS)}
        row |= {"goal": goal}
        if version == 7 and installed:
            row |= apart(_peer_times, dtype, SIZES, thread_count, PEER_ROUNDS)
            mine, theirs = (apart(_peak, way, dtype, SIZES, thread_count) / 1e6 for way in ("ours", "peer"))
            row |= {"step_mb": mine, "peer_mb": theirs, "memory_ratio": mine / theirs, **_PEER_GOALS}
        if version == 7 and not installed:
            row |= {"note": "not installed: pip install 'rwkv-miss[hf]'"}
        rows.append(row)
    n_layer, n_embd, vocab_size, tokens, rank = SIZES
    return Table(
        f"A training step of MiSS: {n_layer} layers of {n_embd}, vocabulary {vocab_size}, {tokens} tokens, r = {rank}, "
        f"{ROUNDS} rounds ({PEER_ROUNDS} of the peer, rwkv7-hf + HF PEFT), {thread_count} thread(s)",
        rows,
    )


def step_and_products(version: int, dtype: str, sizes: Sizes) -> dict[str, Callable[[], object]]:
    """A step, and its products alone."""
    model, tokens = make_model(version, dtype, sizes), _tokens(sizes)
    step = partial(_step, model, tokens)
    return {"step": step, "products": products(step)}


def products(work: Callable[[], object]) -> Callable[[], None]:
    """The matrix products that `work` does, and nothing else of it, with random factors of the same layout."""
    with _Recorder() as recorder:
        work()
    factors = [(_like(a), _like(b)) for a, b in recorder.factors]

    def multiply() -> None:
        for a, b in factors:
            torch.matmul(a, b)

    return multiply


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.factors: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in _PRODUCTS:
            a, b = [x.detach() for x in args if isinstance(x, Tensor)][-2:]
            self.factors.append((a.to("meta"), b.to("meta")))
        return func(*args, **(kwargs or {}))


def _like(x: Tensor) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype).normal_()


def _times(version: int, dtype: str, sizes: Sizes, thread_count: int, rounds: int) -> dict[str, float]:
    with threads(thread_count):
        found = by_turns(step_and_products(version, dtype, sizes), rounds)
    medians = {f"{name}_s": statistics.median(seconds) for name, seconds in found.items()}
    return medians | ratios("ratio", found["step"], found["products"])


def _peer_times(dtype: str, sizes: Sizes, thread_count: int, rounds: int) -> dict[str, float]:
    with threads(thread_count):
        model, tokens = make_model(7, dtype, sizes), _tokens(sizes)
        peer = make_peer(model)
        ours, theirs = _step(model, tokens), peer_step(peer, tokens)
        # All gradients together: in bf16 the smallest are rounding for the most part, by ours as by theirs.
        for mine, other in ((ours[0], theirs[0]), (_joined(ours[1:]), _joined(theirs[1:]))):
            difference = (mine - other).norm() / other.norm()
            assert difference <= _TOLERANCE[dtype], f"the peer disagrees: {difference:.1e}"
        found = by_turns({"peer": partial(peer_step, peer, tokens), "ours": partial(_step, model, tokens)}, rounds)
    return {"peer_s": statistics.median(found["peer"]), **ratios("peer_ratio", found["peer"], found["ours"])}


def _peak(way: str, dtype: str, sizes: Sizes, thread_count: int) -> int:
    with threads(thread_count):
        model, tokens = make_model(7, dtype, sizes), _tokens(sizes)
        if way == "ours":
            _step(model, tokens[:, :3])  # what the libraries keep for themselves
            return peak_bytes(partial(_step, model, tokens))
        peer = make_peer(model)
        peer_step(peer, tokens[:, :3])
        return peak_bytes(partial(peer_step, peer, tokens))


def make_model(version: int, dtype: str, sizes: Sizes) -> RWKV:
    """A model of random weights with MiSS, on the CPU, whose gradients are all of a size that rounding leaves alone."""
    torch.manual_seed(0)
    model = MODELS[version](new_config(version, sizes.n_layer, sizes.n_embd, sizes.vocab_size))
    for name, p in model.named_parameters():
        p.data.uniform_(-0.05, 0.05)
        if name.split(".")[-2].startswith("ln") and name.endswith("weight"):
            p.data += 1
    inject(model.to(_DTYPES[dtype]), AdapterConfig(r=sizes.rank))
    for p in trained_parameters(model).values():
        p.data.normal_(std=0.01)
    return model


def _joined(gradients: list[Tensor]) -> Tensor:
    return torch.cat([gradient.flatten().float() for gradient in gradients])


def _tokens(sizes: Sizes) -> Tensor:
    # From 1 on: rwkv7-hf takes token 0 for padding.
    return torch.randint(1, sizes.vocab_size, (1, sizes.tokens + 1), generator=torch.Generator().manual_seed(0))


def train_on(model: RWKV, batch: dict[str, Any]) -> list[Tensor]:
    """The mean loss of a batch of `rwkv_miss.data.batches`, and the gradients of D."""
    log_prob, _ = batch_log_probs(model, batch)
    loss = -log_prob / batch["step_tokens"]
    return [loss.detach(), *torch.autograd.grad(loss, list(trained_parameters(model).values()))]


def _step(model: RWKV, tokens: Tensor) -> list[Tensor]:
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "step_tokens": tokens.shape[1] - 1}
    return train_on(model, batch | {"seq_start": torch.zeros_like(tokens[:, 1:], dtype=torch.bool)})
