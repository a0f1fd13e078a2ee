"""The benchmark of a run's start, with a command that only says what a run says."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from rwkv_miss.benchmarks import start
from rwkv_miss.errors import RunError


@pytest.fixture
def command(monkeypatch, tmp_path):
    """`command(lines)`: what runs in Python's place, in sh."""
    path = tmp_path / "python"
    monkeypatch.setattr(sys, "executable", str(path))
    for name, value in {"SIZES": (1, 64), "ROUNDS": 3, "RECORDS": 8}.items():
        monkeypatch.setattr(start, name, value)

    def write(lines: str) -> Path:
        path.write_text(f"#!/bin/sh\n{lines}\n")
        path.chmod(0o755)
        return path

    return write


def test_the_parts_of_a_start(command):
    command(
        '[ "$1" = -c ] && exit; sleep 0.05; echo RWKV-7 and so on; echo training; sleep 0.1; echo "step 1/1  loss 1"'
    )
    imports, settings, first_step, whole = start.bench_start(1).rows
    assert [row["name"] for row in (imports, settings, first_step)] == [
        *("imports", "settings, data, base", "trainer, first step")
    ]
    assert whole["name"] == "all" and whole["goal"] == 6 and whole["seconds"] >= 0.15
    assert first_step["seconds_min"] >= 0.09 and imports["seconds"] > 0
    assert all(row["seconds_min"] <= row["seconds"] <= row["seconds_max"] for row in (imports, first_step, whole))


@pytest.mark.parametrize("lines", ["echo RWKV-7; echo no room >&2; exit 1", "echo RWKV-7; echo no room >&2"])
def test_a_run_that_fails_is_not_timed(command, lines):
    command(f'[ "$1" = -c ] && exit; {lines}')
    with pytest.raises(RunError, match="the run has failed: no room"):
        start.bench_start(1)
