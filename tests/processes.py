"""Processes that a test starts, none of which outlives it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

Start = Callable[..., subprocess.Popen]


@contextmanager
def processes() -> Iterator[Start]:
    """Yields `start(command, **options of Popen)`: each process leads a session of its own, and has pipes for what it
    prints, as text, unless told otherwise. At the end whatever is left of the sessions is killed: also the processes
    that they have started, such as the ranks of a run or a compiler."""
    started = []

    def start(command: Sequence[str], **options) -> subprocess.Popen:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, **pipes | options, start_new_session=True))
        return started[-1]

    try:
        yield start
    finally:
        for process in started:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:  # all of it has ended
                continue
        for process in started:
            process.communicate()


def run_process(command: Sequence[str], timeout: float, **options) -> subprocess.CompletedProcess:
    """Runs a command to its end; after `timeout` seconds it is killed and TimeoutExpired raised."""
    with processes() as start:
        process = start(command, **options)
        stdout, stderr = process.communicate(timeout=timeout)
        return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


def finish(*started: subprocess.Popen, timeout: float = 120) -> list[str]:
    """What each process has printed. All must end well, each within `timeout` seconds after the one before."""
    printed = [process.communicate(timeout=timeout) for process in started]
    for process, (_, errors) in zip(started, printed, strict=True):
        assert process.returncode == 0, errors
    return [output for output, _ in printed]


def free_port() -> str:
    """A port of this machine that no program uses."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])
