"""The memory benchmark: it runs, and its figures have the expected order."""

from __future__ import annotations

import pytest

from rwkv_miss.benchmarks import memory


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

    monkeypatch.setattr(memory.Path, "write_text", refused)
    with pytest.raises(memory.RunError, match=r"does not say a process's peak memory \(no\)"):
        memory.step_bytes(1, False, 16, None, 0)
