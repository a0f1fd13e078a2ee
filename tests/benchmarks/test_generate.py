"""The benchmark of the engine beside the `rwkv` package, and of the start of a run."""

from __future__ import annotations

import pytest

from rwkv_miss.benchmarks import generate, start


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


@pytest.mark.slow
def test_the_parts_of_a_start(monkeypatch):
    for name, value in {"SIZES": (1, 64), "ROUNDS": 1, "RECORDS": 8}.items():
        monkeypatch.setattr(start, name, value)
    *parts, whole = start.bench_start(1).rows
    assert [part["name"] for part in parts] == ["imports", "settings, data, base", "trainer, first step"]
    assert sum(part["seconds"] for part in parts) == pytest.approx(whole["seconds"]) and whole["goal"] == 6
