"""Work that is shared out over processes.

They are started by a command of their own, not by `multiprocessing`: that would run the user's script again in each of
them, which only works for scripts that expect it, and a fork of a process in which OpenMP has threads can hang.
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
from queue import SimpleQueue
from typing import Any, TypeVar

from rwkv_miss.errors import RunError

_T = TypeVar("_T")
_R = TypeVar("_R")


def usable_cores() -> int:
    """The CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def map_in_processes(function: Callable[[_T], _R], items: Iterable[_T], count: int) -> Iterator[_R]:
    """function(item) of each item, in order, computed in `count` processes; in this one if that is 1. Few items at a
    time are in memory.

    Args:
        function: can be pickled, and comes from an installed module.

    Raises:
        RunError: a process has ended before its time.
        Exception: whatever the function raises, for the first item for which it does.
    """
    if count == 1:
        yield from map(function, items)
        return
    with ExitStack() as stack:
        idle: SimpleQueue[subprocess.Popen] = SimpleQueue()
        for _ in range(count):
            idle.put(stack.enter_context(_worker(function)))
        threads = ThreadPoolExecutor(count)
        stack.callback(threads.shutdown, cancel_futures=True)
        waiting: deque[Future[_R]] = deque()
        for item in items:
            waiting.append(threads.submit(_ask, idle, item))
            if len(waiting) > 2 * count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


@contextmanager
def _worker(function: Callable) -> Iterator[subprocess.Popen]:
    code = f"import sys; sys.path[:] = {sys.path!r}; from rwkv_miss.data.workers import serve; serve()"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None and process.stdout is not None
    try:
        pickle.dump(function, process.stdin)
        yield process
    finally:
        with suppress(OSError):  # it has ended already
            process.stdin.close()  # at which it ends
        process.stdout.close()
        process.wait()


def _ask(idle: SimpleQueue[subprocess.Popen], item: Any) -> Any:
    worker = idle.get()
    assert worker.stdin is not None and worker.stdout is not None
    try:
        pickle.dump(item, worker.stdin)
        worker.stdin.flush()
        found, error = pickle.load(worker.stdout)
    except (OSError, EOFError, pickle.UnpicklingError):
        raise RunError(
            f"a process that tokenises has ended with status {worker.wait()}; if it was killed, memory may be short"
        ) from None
    finally:
        idle.put(worker)
    if error is not None:
        raise error
    return found


def serve() -> None:
    """What each process does: it answers each item that comes in with (what the function makes of it, None), or with
    (None, the exception)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this one
    items, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what is printed must not come among the answers
    function = pickle.load(items)
    while True:
        try:
            item = pickle.load(items)
        except EOFError:
            return
        found = failed = None
        try:
            found = function(item)
        except Exception as error:
            failed = error
        pickle.dump((found, failed), answers)
        answers.flush()
