"""Work that is shared out over processes.

They are started by a command of their own, not by `multiprocessing`: that would run the user's script again in each of
them, which only scripts that expect it can bear. The first of them loads what the work needs (a tokenizer takes 240 MB)
and becomes the others by forks, so that all have it in common. A process in which torch has threads cannot fork.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from itertools import chain
from queue import SimpleQueue
from typing import Any, BinaryIO, NamedTuple, TypeVar

from rwkv_miss.errors import RunError

# The C library of most Linux systems then asks for large pages. A tokenizer's table is read at random places, and a
# processor knows the addresses of few pages at once: with small ones tokenising takes up to 1.5 times as long.
_TUNABLES, _LARGE_PAGES = "GLIBC_TUNABLES", "glibc.malloc.hugetlb=1"

# What the pipes hold; by default it is 64 KB, and a block of 4 MB takes four times as long through them.
_PIPE_SIZE = 1 << 20

_T = TypeVar("_T")
_R = TypeVar("_R")


def usable_cores() -> int:
    """The CPU cores that this process may use, where it can share work out over processes; otherwise 0."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") and hasattr(os, "fork") else 0


def map_in_processes(function: Callable[[_T], _R], items: Iterable[_T], count: int) -> Iterator[_R]:
    """function(item) of each item, in order, computed in `count` processes; in this one if that is 0. A few items at a
    time are in memory.

    Args:
        function: can be pickled.

    Raises:
        RunError: a process has ended before its time.
        Exception: whatever the function raises, for the first item for which it does.
    """
    if count == 0:
        yield from map(function, items)
        return
    with _started(function, count) as workers, ExitStack() as stack:
        idle: SimpleQueue[_Worker] = SimpleQueue()
        for worker in workers:
            idle.put(worker)
        threads = ThreadPoolExecutor(count)
        stack.callback(threads.shutdown, cancel_futures=True)
        waiting: deque[Future[_R]] = deque()
        for item in items:
            waiting.append(threads.submit(_ask, idle, item))
            if len(waiting) > count + 4:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


class _Worker(NamedTuple):
    """The pipes to a process, and from it."""

    items: BinaryIO
    answers: BinaryIO


@contextmanager
def _started(function: Callable, count: int) -> Iterator[list[_Worker]]:
    """Processes that answer items with what the function makes of them. They end when the pipes to them are closed,
    which they also are when this process ends."""
    pipes = [(*os.pipe(), *os.pipe()) for _ in range(count)]
    workers = [_Worker(os.fdopen(items, "wb"), os.fdopen(answers, "rb")) for _, items, answers, _ in pipes]
    theirs = [(items, answers) for items, _, _, answers in pipes]
    for number in chain(*theirs):
        _enlarge(number)
    code = f"import sys; sys.path[:] = {sys.path!r}; from rwkv_miss.data.workers import serve; serve({theirs})"
    env = os.environ | {_TUNABLES: ":".join(filter(None, (os.environ.get(_TUNABLES), _LARGE_PAGES)))}
    first = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, pass_fds=[*chain(*theirs)], env=env)
    for number in chain(*theirs):
        os.close(number)
    try:
        assert first.stdin is not None
        with suppress(OSError), first.stdin:  # if it has ended, that is found by whoever asks
            pickle.dump(function, first.stdin)
        yield workers
    finally:
        for file in chain(*workers):
            with suppress(OSError):  # what is left for a process that has ended
                file.close()
        first.wait()


def _enlarge(pipe: int) -> None:
    """Lets a pipe hold `_PIPE_SIZE`, where the system can do that and allows it."""
    import fcntl  # not on Windows

    with suppress(OSError, AttributeError):
        fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, _PIPE_SIZE)


def _ask(idle: SimpleQueue[_Worker], item: Any) -> Any:
    worker = idle.get()
    try:
        pickle.dump(item, worker.items)
        worker.items.flush()
        found, error = pickle.load(worker.answers)
    except (OSError, EOFError, pickle.UnpicklingError):
        raise RunError("a process that tokenises has ended before its time: memory may be short") from None
    finally:
        idle.put(worker)
    if error is not None:
        raise error
    return found


def serve(pipes: list[tuple[int, int]]) -> None:
    """What the started process does. `pipes`: for each process the file to read items from, and the one to write
    answers to."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this one
    function = pickle.load(sys.stdin.buffer)
    mine = next((pipe for pipe in pipes[1:] if os.fork() == 0), pipes[0])
    for number in chain(*pipes):
        if number not in mine:  # the end of a process is seen when nobody has its pipes
            os.close(number)
    with open(mine[0], "rb") as items, open(mine[1], "wb") as answers:
        while items.peek(1):
            found = failed = None
            try:
                found = function(pickle.load(items))
            except Exception as error:
                failed = error
            pickle.dump((found, failed), answers)
            answers.flush()
    with suppress(ChildProcessError):  # those that were forked from this one, which nobody else waits for
        while True:
            os.wait()
