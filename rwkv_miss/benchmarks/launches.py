"""Counts, without a GPU, the kernels that a training step launches there, the bytes that they move, what it keeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rwkv_miss.benchmarks.common import Table
from rwkv_miss.config import AdapterConfig, PlanConfig
from rwkv_miss.planning.launches import KINDS, Operation, fused, trace_step
from rwkv_miss.planning.shapes import Base, find_base
from rwkv_miss.planning.step import step_phases

SHAPES = ((7, "0.1b"), (7, "1.5b"), (6, "1.6b"))
"""RWKV's version and the name of a released model."""
ROWS, LENGTH = 8, 1024


def bench_launches(thread_count: int) -> Table:
    """What one layer adds to a step of MiSS (r 32, bf16, frozen base), forward and backward: a model of three layers
    less one of two.

    Returns:
        A table with a row for each of `SHAPES` and of `KINDS`, and one for them all: model; what; launches and kb, the
        kernels and the kilobytes that they move for each token; least_launches and least_kb, the same if everything
        between two products or recurrences were one kernel (`rwkv_miss.planning.launches.fused`). The last row also has
        kept_kb and kept_checkpointing_kb: the activations that wait for the backward pass, for each token.
    """
    rows = []
    for version, shape in SHAPES:
        config = PlanConfig(shape=shape, version=version, batch_size=ROWS, ctx_len=LENGTH, adapter=AdapterConfig(r=32))
        rows += layer_rows(find_base(config), config, f"RWKV-{version} {shape.upper()}")
    return Table(f"One layer in a step of MiSS, r 32, bf16, {ROWS} rows of {LENGTH:,} tokens; KB for each token", rows)


def layer_rows(base: Base, config: PlanConfig, model: str) -> list[dict[str, Any]]:
    """The rows of `bench_launches` for one base, of at least three layers."""
    fewer, more = (trace_step(base.with_layers(n), config) for n in (2, 3))
    tokens = 1000 * config.batch_size * config.ctx_len
    rows = []
    for what, kinds in [*((kind, (kind,)) for kind in KINDS), ("all", KINDS)]:
        row: dict[str, Any] = {"model": model, "what": what}
        for prefix, low, high in (("", fewer, more), ("least_", fused(fewer), fused(more))):
            launches, moved = (b - a for a, b in zip(_sums(low, kinds), _sums(high, kinds), strict=True))
            row |= {f"{prefix}launches": launches, f"{prefix}kb": moved / tokens}
        rows.append(row)
    for name, checkpointing in (("kept_kb", False), ("kept_checkpointing_kb", True)):
        kept = replace(config, gradient_checkpointing=checkpointing)
        held = [step_phases(base.with_layers(n), kept, False)["head"]["activations"] for n in (2, 3)]
        rows[-1][name] = (held[1] - held[0]) / tokens
    return rows


def _sums(operations: Sequence[Operation], kinds: Sequence[str]) -> tuple[int, int]:
    """The launches and the bytes of the operations of these kinds."""
    chosen = [x for x in operations if x.kind in kinds]
    return sum(x.launches for x in chosen), sum(x.bytes for x in chosen)
