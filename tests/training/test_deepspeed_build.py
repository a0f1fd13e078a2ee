"""DeepSpeed's op for CPUs is built under our own lock: a build that was killed holds nobody up."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

LOAD = """
import logging, os
os.environ["DS_ACCELERATOR"] = "cpu"
logging.basicConfig(format="%(message)s", level=logging.WARNING)
logging.getLogger("rwkv_miss").setLevel(logging.INFO)
from rwkv_miss.training import zero
zero._load_op("ShareMemCommBuilder", "communication between processes on a CPU")
from deepspeed.comm.torch import build_shm_op
assert build_shm_op() is not None
"""


@pytest.fixture
def start(tmp_path, start_process) -> Callable[..., subprocess.Popen]:
    """`start(**environment)` starts a process that loads the op from an empty cache."""

    def one(**changes: str) -> subprocess.Popen:
        environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache"), "TMPDIR": str(tmp_path)} | changes
        return start_process([sys.executable, "-c", LOAD], env=environment)

    return one


def folder(tmp_path: Path) -> Path | None:
    """Where the op is built, once that has begun."""
    found = list(tmp_path.glob("cache/rwkv_miss/deepspeed/*/*/lock"))
    return found[0].parent if found else None


def test_a_build_that_was_killed_and_two_that_begin_at_once(start, tmp_path):
    slow = tmp_path / "slow-c++"
    slow.write_text('#!/bin/sh\ncase "$*" in *" -c "*) exec sleep 300;; *) exec c++ "$@";; esac\n')
    slow.chmod(0o755)
    killed = start(CXX=str(slow))
    deadline = time.monotonic() + 120
    while folder(tmp_path) is None:
        assert killed.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert (folder(tmp_path) / "lock").exists(), "PyTorch's mark of the dead build"

    both = [start(), start()]
    said = [process.communicate(timeout=240)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert sum("compiling DeepSpeed's communication" in text for text in said) == 1
    assert folder(tmp_path) is None


def test_what_cannot_be_compiled_is_one_message(start, tmp_path):
    broken = tmp_path / "broken-c++"
    broken.write_text('#!/bin/sh\ncase "$*" in *" -c "*) exit 1;; *) exec c++ "$@";; esac\n')
    broken.chmod(0o755)
    _, said = start(CXX=str(broken)).communicate(timeout=120)
    assert "RunError: DeepSpeed's communication between processes on a CPU cannot be compiled" in said
    assert "use --strategy ddp" in said
