"""Runs in forked processes end as those of a command do, and in time."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.training.forked import run_forked

pytestmark = pytest.mark.slow


def one_fails() -> None:
    print("rank", os.environ["LOCAL_RANK"], os.getpid(), flush=True)
    if os.environ["LOCAL_RANK"] == "1":
        sys.exit(3)


def all_hang() -> None:
    print(os.getpid(), flush=True)
    time.sleep(1e6)


def test_what_they_print_and_the_status_of_the_one_that_fails():
    done = run_forked(["--version"], 2, one_fails)
    assert done.returncode == 3
    assert sorted(line.split()[:2] for line in done.stdout.splitlines() if line.startswith("rank")) == [
        ["rank", "0"],
        ["rank", "1"],
    ]
    assert "rwkv-miss 0" in done.stdout
    wrong = run_forked(["train", "--lr=fast"])
    assert wrong.returncode == 2 and wrong.stderr.startswith("rwkv-miss: ")


def test_what_hangs_is_killed():
    with pytest.raises(subprocess.TimeoutExpired) as e:
        run_forked(["--version"], 2, all_hang, timeout=20)
    pids = e.value.stdout.split()
    assert len(pids) == 2 and not any(Path("/proc", pid).exists() for pid in pids)
