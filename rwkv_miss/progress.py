"""How far a command has come, on stderr: a bar on a terminal, elsewhere a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Report = Callable[[int, int], None]
"""What long work calls now and then: report(units done, units in all). Calls cost next to nothing."""

# Seconds between two lines, and between two changes of the bar.
_LINE_EVERY = 10.0
_BAR_EVERY = 0.1


@contextmanager
def show_progress(what: str, stream: TextIO | None = None) -> Iterator[Report]:
    """`with show_progress("answers") as report: ...` shows what `report` is told, with the time that is left.

    Args:
        what: the units, in the plural.
        stream: stderr when not given. On a terminal the bar is gone at the end; elsewhere the first line comes after
            10 seconds.
    """
    stream = stream or sys.stderr
    if not stream.isatty():
        yield _lines(what, stream)
        return
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(
        *columns, TextColumn("ETA"), TimeRemainingColumn(), console=Console(file=stream), transient=True
    ) as bar:
        task = bar.add_task(what, total=None)
        yield _at_most_every(_BAR_EVERY, lambda done, total: bar.update(task, completed=done, total=total))


@contextmanager
def no_progress(what: str) -> Iterator[Report]:
    """`show_progress` that shows nothing."""
    yield lambda done, total: None


def _lines(what: str, stream: TextIO) -> Report:
    start = time.monotonic()

    def line(done: int, total: int) -> None:
        left = "unknown"
        if done:
            left = str(timedelta(seconds=round((time.monotonic() - start) / done * (total - done))))
        print(f"{what}: {done:,} of {total:,}, ETA {left}", file=stream, flush=True)

    return _at_most_every(_LINE_EVERY, line, start)


def _at_most_every(seconds: float, report: Report, last: float = -float("inf")) -> Report:
    """`report`, but calls sooner than `seconds` after the one before, or after the time `last`, are left out."""

    def sometimes(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= seconds:
            last = now
            report(done, total)

    return sometimes
