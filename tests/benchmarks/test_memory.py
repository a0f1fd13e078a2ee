"""The memory benchmark: it runs, and its figures have the expected order."""

from __future__ import annotations

import pytest

from rwkv_miss.benchmarks import common, head, memory
from rwkv_miss.errors import RunError


@pytest.mark.slow
def test_memory_grows_with_whole_rows_and_not_where_gradients_are_cut(monkeypatch):
    monkeypatch.setattr(memory, "LENGTHS", (2048, 8192))
    whole, _, exact, _, cut, _ = rows = memory.bench_memory(1).rows
    assert [row["gradient_checkpointing"] for row in rows] == ["no", "yes"] * 3
    assert whole["T 8192"] > 3 * whole["T 2048"] > 0
    assert exact["T 8192"] < whole["T 8192"] / 6  # about a third if freed memory is not returned to the system
    assert cut["T 8192"] < whole["T 8192"] / 8


def test_a_system_that_does_not_tell(monkeypatch):
    def refused(path, text):
        raise PermissionError("no")

    monkeypatch.setattr(common.Path, "write_text", refused)
    with pytest.raises(RunError, match=r"does not say a process's peak memory \(no\)"):
        memory.step_bytes(1, False, 16, None, 0)


@pytest.mark.slow
def test_the_head_takes_less_than_all_logits(monkeypatch):
    for name, value in {"TOKENS": 2048, "VOCAB_SIZE": 32768, "N_EMBD": 32, "ROUNDS": 1}.items():
        monkeypatch.setattr(head, name, value)
    rows = head.bench_head(1).rows
    assert [row["name"] for row in rows] == [f"{d}, head {h}" for d in ("bf16", "fp32") for h in ("frozen", "trained")]
    for row in rows:
        assert row["ratio_min"] <= row["ratio"] <= row["ratio_max"] and row["plain_ms"] > 0
        assert row["plain_mb"] > 1.5 * 4e-6 * 2048 * 32768 and row["memory_ratio"] == row["mb"] / row["plain_mb"] < 0.8


def test_a_head_that_disagrees_is_not_timed(monkeypatch):
    for name, value in {"TOKENS": 4, "VOCAB_SIZE": 8, "N_EMBD": 8}.items():
        monkeypatch.setattr(head, name, value)
    monkeypatch.setitem(head._WAYS, "ours", lambda h, w, t: 1.1 * head._plain(h, w, t))
    with pytest.raises(AssertionError, match="the results disagree"):
        head.bench_head(1)
