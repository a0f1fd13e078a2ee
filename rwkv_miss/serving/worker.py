"""The thread that owns the engine. What others want of it are calls, which it makes between two steps, in their
order."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, TypeVar

from rwkv_miss.generation.engine import Engine, Piece
from rwkv_miss.generation.sampling import Sampling

_T = TypeVar("_T")


@dataclass(eq=False)
class Job:
    """One answer that is to be written.

    on_item: gets each of its pieces in the event loop; the last item is a piece that says why the answer ended, or an
        error.
    member: of the engine; set by the thread.
    """

    prompt: Sequence[int]
    sampling: Sampling
    adapter: str | None
    on_item: Callable[[Piece | Exception], None]
    member: int | None = None


class Worker:
    """A thread that steps the engine as long as it has members. All methods are called in the event loop.

    Args:
        on_failure: called in the event loop when a step has failed, after which the engine is of no use. From then on
            every call raises the error.
    """

    def __init__(self, engine: Engine, on_failure: Callable[[], None]) -> None:
        self.failure: Exception | None = None
        self._engine = engine
        self._on_failure = on_failure
        self._loop = asyncio.get_running_loop()
        self._calls: SimpleQueue[Callable[[], Any] | None] = SimpleQueue()
        self._jobs: dict[int, Job] = {}  # by their members; the thread's
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def call(self, function: Callable[..., _T], *arguments: Any) -> Awaitable[_T]:
        """What the function returns or raises, called in the thread."""
        found: concurrent.futures.Future[_T] = concurrent.futures.Future()

        def run() -> None:
            if found.set_running_or_notify_cancel():
                try:
                    if self.failure:
                        raise self.failure
                    found.set_result(function(*arguments))
                except Exception as error:
                    found.set_exception(error)

        self._calls.put(run)
        return asyncio.wrap_future(found)

    def begin(self, jobs: Sequence[Job]) -> None:
        """Adds jobs to the engine, all before the same step. What is wrong with one of them comes as its only item."""
        self._calls.put(lambda: self._begin(jobs))

    def cancel(self, job: Job) -> None:
        """Its last piece comes with the next step; one that has ended is left as it is."""
        self._calls.put(lambda: self._cancel(job))

    def stop(self) -> None:
        """Ends the thread after the step that it is in."""
        self._calls.put(None)
        self._thread.join()

    def _run(self) -> None:
        while True:
            while self.failure or not len(self._engine) or not self._calls.empty():
                if (call := self._calls.get()) is None:
                    return
                call()
            try:
                pieces = self._engine.step()
            except Exception as error:  # whatever the model's operations raise, such as a lack of memory
                self._fail(error)
                continue
            jobs = [self._jobs.pop(p.member) if p.finish else self._jobs[p.member] for p in pieces]
            self._loop.call_soon_threadsafe(_hand_out, jobs, pieces)

    def _begin(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            try:
                if self.failure:
                    raise self.failure
                job.member = self._engine.add(job.prompt, job.sampling, adapter=job.adapter)
            except Exception as error:
                self._loop.call_soon_threadsafe(job.on_item, error)
            else:
                self._jobs[job.member] = job

    def _cancel(self, job: Job) -> None:
        if job.member in self._jobs:
            self._engine.cancel(job.member)

    def _fail(self, error: Exception) -> None:
        self.failure = error
        jobs = list(self._jobs.values())
        self._jobs.clear()
        self._loop.call_soon_threadsafe(_hand_out, jobs, [error] * len(jobs))
        self._loop.call_soon_threadsafe(self._on_failure)


def _hand_out(jobs: Sequence[Job], items: Sequence[Piece | Exception]) -> None:
    for job, item in zip(jobs, items, strict=True):
        job.on_item(item)
