"""How far a command is, on stderr: a bar in a terminal, else a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

# Seconds between the lines where stderr is no terminal.
_EVERY = 10.0


@contextmanager
def progress(what: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """Yields a function to call with (done, all), as often as one likes."""
    if sys.stderr.isatty():
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(f"{unit}, ETA")
        with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(what, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)
        return

    start = last = time.monotonic()

    def line(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < _EVERY or done == total:
            return
        last = now
        left = (now - start) / done * (total - done)
        print(f"{what}: {done:,} of {total:,} {unit}, ETA {left:.0f} s", file=sys.stderr, flush=True)

    yield line
