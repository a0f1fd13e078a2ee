"""The benchmark of the engine runs, and has a row for each batch."""

from __future__ import annotations

import pytest

from rwkv_miss.benchmarks import serving


@pytest.mark.slow
def test_a_row_for_each_dtype_and_batch(monkeypatch):
    monkeypatch.setattr(serving, "SIZES", (1, 64))
    monkeypatch.setattr(serving, "REQUESTS", 3)
    monkeypatch.setattr(serving, "ROUNDS", 2)
    rows = serving.bench_serving(1).rows
    batches = ["one adapter", "3 adapters", "one adapter, merged", "base", "one request"]
    assert [(row["dtype"], row["batch"]) for row in rows] == [(d, b) for d in ("fp32", "bf16") for b in batches]
    assert all(row["tokens_per_s"] > 0 for row in rows)
    assert [row["beside_one_adapter"] for row in rows if row["batch"] == "one adapter"] == [1.0, 1.0]
