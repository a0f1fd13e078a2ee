"""The benchmark of a training step: a row for each version and dtype, and a peer that computes the same."""

from __future__ import annotations

import pytest

from rwkv_miss.benchmarks import step


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    for package in ("peft", "rwkv7_hf"):
        pytest.importorskip(package)
    monkeypatch.setattr(step, "SIZES", step.Sizes(2, 64, 256, 9, 8))
    monkeypatch.setattr(step, "ROUNDS", 2)
    monkeypatch.setattr(step, "PEER_ROUNDS", 1)
    monkeypatch.setattr(step, "apart", lambda function, *arguments: function(*arguments))


@pytest.mark.slow
def test_a_row_for_each_version_and_dtype(monkeypatch):
    monkeypatch.setattr(step, "peak_bytes", lambda work: work() and 1000)
    rows = step.bench_step(1).rows
    assert [row["name"] for row in rows] == ["RWKV-7 bf16", "RWKV-7 fp32", "RWKV-6 bf16", "RWKV-6 fp32"]
    for row in rows:
        assert row["step_s"] > 0 < row["products_s"] and row["ratio_min"] <= row["ratio"] <= row["ratio_max"]
        assert ("peer_ratio" in row) == (row["name"][5] == "7")
    assert rows[0]["peer_ratio"] > 0 and rows[0]["memory_ratio"] == 1


@pytest.mark.slow
def test_a_peer_that_disagrees_is_not_timed(monkeypatch):
    right = step.peer_step
    monkeypatch.setattr(step, "peer_step", lambda *arguments: [1.1 * x for x in right(*arguments)])
    with pytest.raises(AssertionError, match=r"the peer disagrees: 9\.1e-02"):
        step._peer_times("fp32", step.SIZES, 1, 1)
