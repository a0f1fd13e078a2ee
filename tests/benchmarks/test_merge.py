"""The merge benchmark runs."""

from __future__ import annotations

import pytest

from rwkv_miss.benchmarks import merge


@pytest.mark.slow
def test_a_row_for_each_base(monkeypatch):
    monkeypatch.setattr(merge, "SIZES", {"tiny": (2, 64)})
    monkeypatch.setattr(merge, "ROUNDS", 1)
    [row] = merge.bench_merge(1).rows
    assert row["ratio"] == row["merge_s"] / row["copy_s"] > 0 < row["merge_mb"]
