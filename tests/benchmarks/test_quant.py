"""The benchmark of quantised bases runs, and its figures have the expected order."""

from __future__ import annotations

import pytest

from rwkv_miss.benchmarks import quant


@pytest.mark.slow
def test_a_row_for_each_base_and_format(monkeypatch):
    monkeypatch.setattr(quant, "SIZES", {"tiny": (2, 128)})
    none, int8, nf4 = rows = quant.bench_quant(1).rows
    assert [row["quant"] for row in rows] == ["none", "int8", "nf4"]
    # Of 12 C^2 weights in a layer, int8 stores 1 byte instead of 2; nf4 half a byte and its scales, of 10 C^2.
    saved = [none["weights_mb"] - row["weights_mb"] for row in (int8, nf4)]
    linears = 2 * 128**2 / 1e6
    assert saved == pytest.approx([12 * linears, 10 * linears * (2 - 0.5625)], rel=0.05)
    assert all(0 < row["load_mb"] <= row["step_mb"] and row["load_s"] > 0 for row in rows)
