"""The processes of a run that one process has started end with it. Without torch: it is seen to before any import.

The processes that Lightning starts are the same command once more; what they are told is in their environment.
"""

from __future__ import annotations

import ctypes
import os
import signal

_PARENT = "RWKV_MISS_PARENT"


def announce_parent() -> None:
    """Lets the processes of the run that this one will start know it as the one that they end with."""
    os.environ[_PARENT] = str(os.getpid())


def end_with_parent() -> None:
    """The kernel will end this process as soon as the one ends that has announced itself to it, if there is one."""
    if not _has_parent():
        return
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1: PR_SET_PDEATHSIG (linux/prctl.h)
    if os.getppid() != int(os.environ[_PARENT]):  # it has ended before this call
        os._exit(1)


def end_parent() -> None:
    """Ends the process that this one ends with, if there is one: it does nothing any more."""
    if _has_parent():
        os.kill(int(os.environ[_PARENT]), signal.SIGKILL)


def _has_parent() -> bool:
    return _PARENT in os.environ and os.environ.get("LOCAL_RANK", "0") != "0"
