"""The benchmark of the engine beside the `rwkv` package."""

from __future__ import annotations

import pytest

from rwkv_miss.benchmarks import generate


@pytest.mark.slow
def test_a_row_for_each_way(monkeypatch):
    pytest.importorskip("rwkv")
    monkeypatch.setattr(generate, "_TOLERANCE", {"fp32": 1e-4})
    for name, value in {"SIZES": (2, 64), "BATCH": 3, "PROMPT": 70, "ROUNDS": 2, "PROMPT_ROUNDS": 1}.items():
        monkeypatch.setattr(generate, name, value)
    rows = generate.bench_generate(1).rows
    assert [row["name"] for row in rows] == ["fp32 decode", "fp32 decode, batch of 3", "fp32 prompt of 70"]
    assert [row["beside"] for row in rows] == ["rwkv package", "batch of 1", "rwkv package"]
    for row in rows:
        assert row["tokens_per_s"] > 0 and row["ratio_min"] <= row["ratio"] <= row["ratio_max"]
