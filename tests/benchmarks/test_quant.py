"""The benchmark of quantised bases runs, and its figures have the expected order."""

from __future__ import annotations

import pytest

from rwkv_miss.benchmarks import quant


@pytest.mark.slow
def test_a_row_for_each_base_and_format(monkeypatch):
    monkeypatch.setattr(quant, "SIZES", {"tiny": (2, 128)})
    monkeypatch.setattr(quant, "QUANTS", ("none", "nf4"))
    none, nf4 = rows = quant.bench_quant(1).rows
    assert [row["quant"] for row in rows] == ["none", "nf4"]
    # 10 C^2 of a layer's weights take 4.5 bits instead of 16.
    assert none["weights_mb"] - nf4["weights_mb"] == pytest.approx(2 * 10 * 128**2 * (2 - 0.5625) / 1e6, rel=0.05)
    assert all(0 < row["load_mb"] <= row["step_mb"] and row["load_s"] > 0 for row in rows)
