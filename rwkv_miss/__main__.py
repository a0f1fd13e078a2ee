"""The process of `rwkv-miss`, which `python -m rwkv_miss` is too: what must be so before anything is imported."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType


def main() -> int:
    """As `rwkv_miss.cli.main`, in a process that is the command's alone."""
    signal.signal(signal.SIGINT, _interrupt)
    _share_cores()
    from rwkv_miss.cli import main as run

    return run()


def _share_cores() -> None:
    """Threads of PyTorch's CPU operations that wait for each other give their core away after some microseconds of
    spinning, unless the user has said how they wait. Without an end to it, a wait for a thread whose core another
    process has can take as long as that process's turn. Read by libgomp when it is loaded; measured in docs/log.md."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def _interrupt(signum: int, frame: FrameType | None) -> None:
    """Ctrl-C. During an import, before a command has begun to do anything, Python may swallow a KeyboardInterrupt (it
    ignores exceptions of the callbacks by which it frees the import's locks), so that the process ends here."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            os.write(sys.stderr.fileno(), b"rwkv-miss: interrupted\n")
            os._exit(128 + signum)
        frame = frame.f_back
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
