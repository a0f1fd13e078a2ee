"""What a test starts does not outlive it."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from tests.processes import processes, run_process

PARENT = "import subprocess, sys; print(subprocess.Popen(['sleep', '300']).pid, flush=True); sys.stdin.read()"


def is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().split()[2] != "Z"
    except FileNotFoundError:
        return False


def ends(pid: int) -> bool:
    deadline = time.monotonic() + 10
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not is_running(pid)


def test_a_child_ends_with_the_test_that_fails():
    with pytest.raises(ZeroDivisionError), processes() as start:
        process = start([sys.executable, "-c", PARENT], stdin=subprocess.PIPE)
        child = int(process.stdout.readline())
        assert is_running(child)
        _ = 1 / 0
    assert ends(child) and process.returncode is not None


@pytest.mark.slow
def test_a_child_ends_with_a_command_that_takes_too_long(tmp_path):
    said = tmp_path / "said"
    reading, writing = os.pipe()
    with pytest.raises(subprocess.TimeoutExpired), said.open("w") as file:
        run_process([sys.executable, "-c", PARENT], timeout=2, stdin=reading, stdout=file)
    os.close(writing)
    assert ends(int(said.read_text()))
