"""When a process of a run fails, dies or hangs, all end in time, one message says why, and what was saved is there."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from rwkv_miss.training.checks import last_checkpoint
from tests.training.runs import as_arguments

TIME = 150  # the bound is 60 s after the failure; to start takes longer on a busy machine
SILENT = "rank {} of 2 has given no sign of life for 30 s"
# Which rank, when and what; the message, or None where nothing of the run is left to say anything; the exit status.
CASES = {
    "one is killed at its start": (1, "start", "killed", r"the process of local rank 1 was ended by SIGKILL", 1),
    "one is killed in a step": (1, "3", "killed", r"the process of local rank 1 was ended by SIGKILL", 1),
    "the first is killed at its start": (0, "load", "killed", None, -9),
    "the first is killed in a step": (0, "3", "killed", None, -9),
    "one is stopped": (1, "3", "stopped", SILENT.format(1), 1),
    "the first is stopped": (0, "3", "stopped", SILENT.format(0), -9),
    "one hangs": (1, "3", "hangs", r"no process has gone on for 0\.2 minutes; rank 1 is behind the others", 1),
    "one has a failure": (1, "3", "fails", r"rank 1: a failure", 2),
    "the first has a failure": (0, "3", "fails", r"a failure", 2),
    "one has NaN": (1, "3", "nan", r"rank 1: step 3: the loss is nan; the first module", 1),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_all_end_and_one_message_says_why(make_config, start_process, case):
    rank, stage, what, message, status = CASES[case]
    ends(start_process, make_config(strategy="ddp"), rank, stage, what, message, status)


def ends(start_process, config, rank, stage, what, message, status) -> None:
    config = replace(config, devices=2, batch_size=4, save_every=1, hang_minutes=0.2 if what == "hangs" else 30)
    command = [sys.executable, "-m", "tests.training.on_failure", str(rank), stage, what]
    process = start_process([*command, "train", *as_arguments(config)])
    _, said = process.communicate(timeout=TIME)
    assert process.returncode == status, said
    assert "Traceback" not in said
    lines = [line for line in said.splitlines() if line.startswith("rwkv-miss train:")]
    if message is None:
        assert not lines, said
    else:
        assert len(lines) == 1 and re.match(f"rwkv-miss train: {message}", lines[0]), said
    assert none_is_left(process), said
    saved = last_checkpoint(Path(config.out) / "checkpoints")
    assert (saved[1] if saved else 0) == (int(stage) - 1 if stage.isdigit() else 0)


def none_is_left(leader: subprocess.Popen) -> bool:
    """Whether all processes of a session end within a few seconds."""
    deadline = time.monotonic() + 5
    while found := [p for p in psutil.process_iter() if session_of(p) == leader.pid]:
        if time.monotonic() > deadline:
            print(found)
            return False
        time.sleep(0.1)
    return True


def session_of(process: psutil.Process) -> int | None:
    try:
        return int(Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[3])
    except OSError:  # it has ended
        return None
