"""The benchmark of data runs."""

from __future__ import annotations

import pytest

from rwkv_miss.benchmarks import data


@pytest.mark.slow
def test_a_row_for_each_format(monkeypatch):
    pytest.importorskip("pyarrow")
    monkeypatch.setattr(data, "SIZES", {suffix: 100_000 for suffix in data.SIZES})
    monkeypatch.setattr(data, "_UNLIKE", 50_000)
    rows = data.bench_data(1).rows
    assert [row["name"] for row in rows] == [".jsonl", ".csv", ".parquet"]
    assert all(row["mb_per_s"] > 0 < row["start_seconds"] and row["token_mb"] > 0.03 for row in rows)
