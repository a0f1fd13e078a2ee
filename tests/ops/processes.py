"""Waiting for processes that a test has started."""

from __future__ import annotations

import subprocess


def finish(*processes: subprocess.Popen, timeout: float = 120) -> list[str]:
    """What each process has printed. All must end well, each within `timeout` seconds after the one before; afterwards
    none of them runs, whatever happened."""
    try:
        printed = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, printed, strict=True):
        assert process.returncode == 0, errors
    return [output for output, _ in printed]
