"""The processes of a run look after each other: when one has failed, died or hangs, all end, and one message says why.

The kernel ends the processes that the first one of a machine has started when that one ends, and it sees how they end.
For what that does not show, such as another machine that is gone or a process that does nothing, every process says in
a store once a second that it is alive and how far it has come. The first process of the run reads what all others say,
and they read what it says.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch.distributed as dist

from rwkv_miss.errors import RunError, Stopped, UserError
from rwkv_miss.training.parent import end_parent

SILENCE = 30.0
"""Seconds without a sign of life after which a process is given up."""
GRACE = 20.0
"""Seconds that the first process of a machine has to end the others."""
_KEPT = "what was saved is kept, --resume auto goes on from it"
# What a collective operation raises if a process at its other end has gone (gloo's errors are plain RuntimeErrors).
_LOST = re.compile(r"gloo|nccl|connection|socket|broken pipe", re.IGNORECASE)


class ElsewhereError(RunError):
    """What has failed is another process, which says why."""


@dataclass(frozen=True)
class _Ending:
    """Why the run ends: what is to be said, unless whatever has failed says it itself, and the exit status."""

    message: str | None
    status: int = 1

    def as_exception(self) -> BaseException:
        if self.message is None:
            return SystemExit(self.status)
        return UserError(self.message) if self.status == 2 else RunError(self.message)


class Watch:
    """This process's threads that look after the others, once there are `look_after` or `join`: one that decides, and
    one that reads and writes the store, which may take for ever when the process that has it stands still."""

    def __init__(self, hang_minutes: float) -> None:
        """hang_minutes: minutes without progress of any process after which the run ends."""
        self._hang_minutes = hang_minutes
        self._children: list[subprocess.Popen] = []
        self._rank, self._world_size, self._local_rank = 0, 1, 0
        self._moves = 0
        self._moved_at = self._exchanged_at = time.monotonic()
        self._heard: dict[int, tuple[bytes, float]] = {}  # a rank's last sign of life, and when it came
        self._ending: _Ending | None = None  # found by either thread
        self._to_tell: dict[str, _Ending] = {}
        self._found, self._settling, self._stop = threading.Event(), threading.Event(), threading.Event()
        self._wake, self._parted = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._exchanger: threading.Thread | None = None

    def look_after(self, children: list[subprocess.Popen]) -> None:
        """Watches the other processes of this machine, which this one has started, in the order of their ranks."""
        self._children = children
        self._thread.start()

    def join(self, store: dist.Store, rank: int, world_size: int, local_rank: int) -> None:
        """Watches all processes of the run by a store that they share. It belongs to the watch from now on."""
        self._rank, self._world_size, self._local_rank = rank, world_size, local_rank
        self._moved_at = self._exchanged_at = time.monotonic()
        self._exchanger = threading.Thread(target=self._keep_exchanging, args=(store,), name="exchange", daemon=True)
        self._exchanger.start()
        if not self._thread.is_alive():
            self._thread.start()

    def moved(self) -> None:
        """To be called whenever this process has gone on, such as by a forward pass."""
        self._moves += 1

    @contextmanager
    def guarding(self) -> Iterator[None]:
        """A context for what the processes do together. If it fails in one of them, the first process of each machine
        raises that failure, and the others end."""
        try:
            yield
        except Exception as e:
            failure = self._settle(e) if self._thread.is_alive() else e
            self._parted.set()
            if failure is e:
                raise
            raise failure from None
        finally:
            self._stop.set()
            self._wake.set()
            if self._exchanger:  # until then none may take the end of another one for a failure
                self._exchanger.join(SILENCE)

    def _settle(self, error: Exception) -> BaseException:
        """What is to be raised instead of `error`, an exception of this process."""
        self._settling.set()
        if isinstance(error, ElsewhereError) or is_lost_connection(error):
            self._found.wait(2 * SILENCE)
            if self._ending:
                if self._local_rank:  # the first process says it, and is perhaps about to end
                    self._leave(self._ending)
                return self._ending.as_exception()
            error = RunError(f"the processes have lost each other ({_first_line(error)}); {_KEPT}")
        elif not isinstance(error, Stopped):  # which all processes are at once
            is_told = isinstance(error, (UserError, RunError))
            if self._local_rank and not is_told:
                traceback.print_exception(error)
            said = f"rank {self._rank}: {error if is_told else repr(error)}"
            self._tell("failed" if self._rank else "ending", _Ending(said, 2 if isinstance(error, UserError) else 1))
            if self._rank == 0 and self._world_size > len(self._children) + 1:
                time.sleep(3)  # for other machines, which read it once a second
        if self._local_rank:
            self._leave(_Ending(str(error)))
        return error

    def _leave(self, ending: _Ending) -> None:
        """Ends this process. The first process of its machine says why, and takes all others with it; if it does not,
        it hangs, and is ended too."""
        if self._local_rank:
            time.sleep(GRACE)
        if ending.message and self._local_rank <= 1:
            print(f"rwkv-miss train: {ending.message}", file=sys.stderr, flush=True)
        end_parent()
        os._exit(ending.status)

    def _run(self) -> None:
        looked_at = time.monotonic()
        while not self._stop.wait(1):
            now = time.monotonic()
            if now - looked_at > SILENCE / 3:  # it is this process that was stopped for a time
                self._moved_at = self._exchanged_at = now
                self._heard.clear()
            looked_at = now
            if ending := self._ending or self._look_at_children() or self._look_at_signs(now):
                self._end(ending)
                return

    def _end(self, ending: _Ending) -> None:
        """Ends this process, unless its main thread has noticed a failure as well: then it is told what this is."""
        if self._rank == 0:
            self._tell("ending", ending)
        self._ending = ending
        self._found.set()
        if self._settling.wait(3) or self._stop.is_set():
            return
        self._leave(ending)

    def _look_at_children(self) -> _Ending | None:
        for local_rank, child in enumerate(self._children, start=1):
            status = child.poll()
            if status in (1, 2):
                return _Ending(None, status)  # it has said why
            if status:
                how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
                why = " (is the machine's memory full?)" if status == -signal.SIGKILL else ""
                return _Ending(f"the process of local rank {local_rank} {how}{why}; {_KEPT}")
        return None

    def _look_at_signs(self, now: float) -> _Ending | None:
        if self._world_size == 1:
            return None
        silent = [rank for rank, (_, since) in [*self._heard.items()] if now - since > SILENCE]
        if self._rank and now - self._exchanged_at > SILENCE:
            silent = [0]
        if silent:
            return _Ending(
                f"rank {silent[0]} of {self._world_size} has given no sign of life for {SILENCE:.0f} s: its process or "
                f"its machine has stopped, or the network between them; {_KEPT}"
            )
        if self._rank == 0 and now - self._moved_at > 60 * self._hang_minutes:
            moves = {rank: int(sign.split()[1]) for rank, (sign, _) in [*self._heard.items()]}
            behind = [str(rank) for rank in moves if moves[rank] == min(moves.values())]
            who = (
                f"rank {', '.join(behind)} is behind the others" if len(behind) < len(moves) else "all are equally far"
            )
            return _Ending(f"no process has gone on for {self._hang_minutes:g} minutes; {who}; {_KEPT}")
        return None

    def _keep_exchanging(self, store: dist.Store) -> None:
        """The thread that uses the store."""
        while self._to_tell or not self._parted.is_set():
            self._wake.wait(0.02 if self._stop.is_set() else 1)
            self._wake.clear()
            try:
                self._exchange(store)
            except RuntimeError as e:  # of the store's kinds
                if self._stop.is_set():  # the first process has ended
                    self._parted.set()
                elif not self._ending:
                    lost = f"the connection to the run's first process is lost ({_first_line(e)}); {_KEPT}"
                    self._ending = _Ending(lost)
                return

    def _exchange(self, store: dist.Store) -> None:
        store.set(f"alive/{self._rank}", f"{time.monotonic()} {self._moves}")
        for key in [*self._to_tell]:  # the first that is told counts
            ending = self._to_tell.pop(key)
            store.compare_set(key, "", f"{ending.status} {ending.message or ''}")
        for rank in range(self._world_size) if self._rank == 0 else [0]:
            key, now = f"alive/{rank}", time.monotonic()
            sign = store.get(key) if store.check([key]) else b"0 0"
            before, since = self._heard.get(rank, (b"0 0", now))
            self._heard[rank] = sign, since if sign == before else now
            if sign.split()[1] != before.split()[1]:
                self._moved_at = now
        told = "failed" if self._rank == 0 else "ending"
        if not self._ending and store.check([told]):
            status, message = store.get(told).decode().split(" ", 1)
            self._ending = _Ending(message or None, int(status))
        self._exchanged_at = time.monotonic()
        if self._stop.is_set():
            store.set(f"parted/{self._rank}", "")
            everyone = [f"parted/{rank}" for rank in range(self._world_size)]
            if self._rank or store.check(everyone):
                self._parted.set()

    def _tell(self, key: str, ending: _Ending) -> None:
        """Lets the other processes know, in a moment."""
        if self._world_size > 1:
            self._to_tell[key] = ending
            self._wake.set()


def is_lost_connection(error: BaseException) -> bool:
    """Whether the error says that a process at the other end of a collective operation has gone."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and not isinstance(error, RunError) and bool(_LOST.search(str(error)))
    )


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
