"""When a process of a run fails, dies or hangs, all end in time, one message says why, and what was saved is there."""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from lightning.fabric.plugins.environments import LightningEnvironment

from rwkv_miss.errors import RunError
from rwkv_miss.training.checks import last_checkpoint
from rwkv_miss.training.meeting import meet
from tests.processes import run_process
from tests.training.runs import as_arguments

TIME = 150  # the bound is 60 s after the failure; to start takes longer on a busy machine
SILENT = "rank {} of 2 has given no sign of life for 8 s"
# Which rank, when and what; the message, or None where nothing of the run is left to say anything; the exit status.
CASES = {
    "one is killed at its start": (1, "start", "killed", r"the process of local rank 1 was ended by SIGKILL", 1),
    "one is killed in a step": (1, "3", "killed", r"the process of local rank 1 was ended by SIGKILL", 1),
    "the first is killed at its start": (0, "load", "killed", None, -9),
    "the first is killed in a step": (0, "3", "killed", None, -9),
    "one is stopped": (1, "3", "stopped", SILENT.format(1), 1),
    "the first is stopped": (0, "3", "stopped", SILENT.format(0), -9),
    "one hangs": (1, "3", "hangs", r"no process has gone on for 0\.3 minutes; rank 1 is behind the others", 1),
    "one has a failure": (1, "3", "fails", r"rank 1: a failure", 2),
    "the first has a failure": (0, "3", "fails", r"a failure", 2),
    "one has NaN": (1, "3", "nan", r"rank 1: step 3: the loss is nan; the first module", 1),
}


# With DeepSpeed, whose processes wait for each other in another way on a CPU.
DEEPSPEED = {
    "one is killed in a step": CASES["one is killed in a step"],
    "the disk of one is full": (1, "1", "disk", r"rank 1: .*step-00000001: cannot be written: No space left", 1),
}
ALL = [("ddp", *case) for case in CASES.values()] + [("deepspeed_stage_2", *case) for case in DEEPSPEED.values()]


@pytest.mark.slow
@pytest.mark.parametrize("case", ALL, ids=[*CASES, *(f"DeepSpeed, {name}" for name in DEEPSPEED)])
def test_all_end_and_one_message_says_why(make_config, start_process, case):
    strategy, rank, stage, what, message, status = case
    hang_minutes = 0.3 if what == "hangs" else 30
    config = make_config(strategy=strategy, devices=2, batch_size=4, save_every=1, hang_minutes=hang_minutes)
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


@pytest.mark.slow
def test_without_shared_memory_deepspeed_trains(make_config):
    """Although a launcher has set the variable for which DeepSpeed's processes share some."""
    if os.geteuid():
        pytest.skip("only root may mount a file system")
    config = make_config(strategy="deepspeed_stage_2", devices=2, batch_size=4, max_steps=1)
    train = shlex.join([sys.executable, "-m", "rwkv_miss", "train", *as_arguments(config)])
    mount = "mount -t tmpfs -o size=4k tmpfs /dev/shm"
    done = run_process(["unshare", "--mount", "sh", "-c", f"{mount} && LOCAL_SIZE=2 exec {train}"], timeout=TIME)
    assert done.returncode == 0, done.stderr


def test_a_port_that_is_taken(make_config, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        environment = LightningEnvironment()
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(port))
        environment.set_world_size(2)
        with pytest.raises(RunError, match=f"^MASTER_PORT {port} is in use on this machine by another program"):
            meet(environment, 1, minutes=0.1)


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
