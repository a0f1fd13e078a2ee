"""What fits on which GPU, by the count of `rwkv-miss plan`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from rwkv_miss.benchmarks.common import Table
from rwkv_miss.config import AdapterConfig, PlanConfig, Quant
from rwkv_miss.planning.memory import memory
from rwkv_miss.planning.shapes import find_base

SHAPES = ("0.1b", "0.4b", "1.5b", "2.9b", "7.2b", "13.3b")
WAYS: dict[str, dict[str, Any]] = {
    "1 GPU": {},
    "8 GPUs, ZeRO-2": {"devices": 8, "strategy": "deepspeed_stage_2"},
    "8 GPUs, ZeRO-3": {"devices": 8, "strategy": "deepspeed_stage_3"},
}
METHODS: dict[str, tuple[tuple[Quant, ...], tuple[str, ...]]] = {
    "miss": (("none", "int8", "nf4"), ("1 GPU", "8 GPUs, ZeRO-3")),
    "state": (("none", "int8", "nf4"), ("1 GPU", "8 GPUs, ZeRO-3")),
    "full": (("none",), tuple(WAYS)),
}
"""The forms of the base that each method is planned for, and which of `WAYS`."""
CARDS = (8, 12, 16, 24, 48, 80)
"""The sizes of GPUs, in GiB."""
RANK, LENGTH = 64, 1024


def bench_fits(thread_count: int) -> Table:
    """The memory that RWKV-7 in bf16 takes of each GPU with one row in a batch. Nothing is computed.

    Returns:
        A table with a row for each of `METHODS` and `SHAPES` and each form of the base: method; model; base; for each
        of the method's ways, without and with gradient checkpointing, the GiB and the smallest of `CARDS` that has as
        much; and the GiB that each of 8 further rows takes on one GPU.
    """
    rows = [
        fits_row(method, shape, quant)
        for method, (quants, _) in METHODS.items()
        for shape in SHAPES
        for quant in quants
    ]
    return Table(f"GiB of each GPU: the card that has as much. Rows of {LENGTH:,} tokens, r {RANK}, bf16", rows)


def fits_row(method: str, shape: str, quant: Quant) -> dict[str, str]:
    """A row of `bench_fits`."""
    row = {"method": method, "model": shape.upper(), "base": "bf16" if quant == "none" else quant}
    alone = PlanConfig(
        shape=shape, adapter=AdapterConfig(method, r=RANK), quant=quant, batch_size=1, ctx_len=LENGTH, precision="bf16"
    )
    base = find_base(alone)
    for checkpointing, note in ((False, ""), (True, ", checkpointing")):
        alone = replace(alone, gradient_checkpointing=checkpointing)
        found = {way: memory(base, replace(alone, **WAYS[way])).device for way in METHODS[method][1]}
        row |= {way + note: cell(found[way]) if way in found else "" for way in WAYS}
        more = memory(base, replace(alone, batch_size=9)).device
        row["further row" + note] = f"{(more - found['1 GPU']) / 8 / 2**30:.2f}"
    return row


def cell(size: float) -> str:
    """A size in bytes: 6.6 GiB -> 6.6: 8, since a GPU of 8 GB has as much."""
    gib = size / 2**30
    return f"{gib:.1f}: {next((card for card in CARDS if gib <= card), 'none')}"
