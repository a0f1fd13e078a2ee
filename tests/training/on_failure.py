"""`rwkv-miss train` in which something happens to one rank.

Usage: python -m tests.training.on_failure RANK STAGE WHAT train ...
STAGE: start (before anything is imported), load (when the model is there), or a number: in that optimizer step.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rwkv_miss.cli import main
from rwkv_miss.errors import UserError


def _fails() -> None:
    raise UserError("a failure")


def _is_a_bug() -> None:
    raise ZeroDivisionError("a bug")


EVENTS: dict[str, Callable[[], Any]] = {
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stopped": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "hangs": lambda: time.sleep(1e6),
    "fails": _fails,
    "bug": _is_a_bug,
}


def watch_for(rank: int, stage: str, what: str) -> None:
    """Lets it happen to this process, if it is the one."""
    is_the_one = int(os.environ.get("LOCAL_RANK", 0)) == rank
    if is_the_one and stage == "start":
        EVENTS[what]()
    from rwkv_miss.training import run, watch
    from rwkv_miss.training.lit_module import LitRWKV

    watch.SILENCE = 8.0  # 30 seconds, to save time
    if what == "disk":
        from rwkv_miss.training import zero

        write = zero.write_pickle

        def refuses(path: Path, content: Any) -> None:
            raise OSError(28, os.strerror(28))

        def late(path: Path, content: Any) -> None:
            time.sleep(1)  # the other has failed by then
            write(path, content)

        zero.write_pickle = refuses if is_the_one else late
        return
    if not is_the_one:
        return

    def before(call: Callable, happens: Callable[..., bool]) -> Callable:
        def wrapped(*args: Any, **options: Any) -> Any:
            if happens(*args):
                EVENTS[what]()
            return call(*args, **options)

        return wrapped

    if stage == "load":
        run.inject = before(run.inject, lambda *_: True)
    elif what == "nan":
        step = LitRWKV._loss_sum

        def is_nan(self: LitRWKV, batch: dict) -> Any:
            return step(self, batch) * (math.nan if self.trainer.global_step + 1 == int(stage) else 1)

        LitRWKV._loss_sum = is_nan
    else:
        LitRWKV.training_step = before(
            LitRWKV.training_step, lambda module, *_: module.trainer.global_step + 1 == int(stage)
        )


if __name__ == "__main__":
    watch_for(int(sys.argv[1]), *sys.argv[2:4])
    sys.exit(main(sys.argv[4:]))
