"""How many answers are written at once, and how many wait for that. All of it runs in the event loop."""

from __future__ import annotations

import asyncio
from collections import deque

from rwkv_miss.serving.errors import ApiError, busy


class Places:
    """A number of places. Who finds too few of them waits, in the order of arrival.

    Args:
        n_places: answers that are written at once.
        n_waiting: answers that may wait for places.
    """

    def __init__(self, n_places: int, n_waiting: int) -> None:
        self.free = n_places
        self._n_places, self._n_waiting = n_places, n_waiting
        self._queue: deque[tuple[int, asyncio.Future[None]]] = deque()

    @property
    def waiting(self) -> int:
        """Answers that wait."""
        return sum(n for n, _ in self._queue)

    async def take(self, n: int) -> None:
        """Waits for n places. Each of them has to be given back.

        Raises:
            ApiError: there are not so many at all, or too many wait already.
        """
        if n > self._n_places:
            raise ApiError(400, f"{n} answers are asked for at once; the most is {self._n_places} (--max_batch)", "n")
        if not self._queue and n <= self.free:
            self.free -= n
            return
        if (waiting := self.waiting) + n > self._n_waiting:
            raise busy(waiting)
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.append((n, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # its turn had come
                self.give(n)
            else:
                self._queue.remove((n, turn))
                self.give(0)  # a shorter one may have waited behind it
            raise

    def give(self, n: int) -> None:
        """Gives n places back."""
        self.free += n
        while self._queue and self._queue[0][0] <= self.free:
            n_taken, turn = self._queue.popleft()
            self.free -= n_taken
            turn.set_result(None)

    def refuse(self, error: ApiError) -> None:
        """All that wait are told this."""
        while self._queue:
            self._queue.popleft()[1].set_exception(error)
