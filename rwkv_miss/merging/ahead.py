"""Work that is done in a thread while the results before it are used."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

_Name = TypeVar("_Name", bound=Hashable)


class _Result(NamedTuple):
    """What a name's result will be, in the bytes from `start` to `stop` of the buffer."""

    start: int
    stop: int
    future: Future[Tensor]


@contextmanager
def computed_ahead(
    sizes: Mapping[_Name, int], compute: Callable[[_Name, Tensor], Tensor], memory: int
) -> Iterator[Callable[[_Name], Tensor]]:
    """In the context, a function that returns `compute` of each name, to be called in the names' order. While the
    caller uses one result, a thread computes those that come next, as many as fit beside it into one buffer. (Blocks of
    memory that come and go cost page faults and leave holes in the heap.)

    Args:
        sizes: the bytes of each name's result.
        compute: called with a name and uint8 memory of that size, in which it puts its result. What it raises is
            raised where the result is asked for.
        memory: bytes of the buffer; it is larger if that is too little for the largest result and one of the next size.
    """
    least = sum(sorted(set(map(_padded, sizes.values())))[-2:])
    buffer = torch.empty(max(least, min(memory, sum(map(_padded, sizes.values())))), dtype=torch.uint8)
    to_start, to_return = deque(sizes), deque(sizes)
    results: deque[_Result] = deque()  # the one that the caller uses, and those behind it

    def start_all_that_fit() -> None:
        while to_start:
            length = _padded(sizes[to_start[0]])
            for at in (results[-1].stop if results else 0, 0):
                if at + length <= len(buffer) and all(at + length <= r.start or r.stop <= at for r in results):
                    break
            else:
                return
            name = to_start.popleft()
            future = thread.submit(compute, name, buffer[at : at + sizes[name]])
            results.append(_Result(at, at + length, future))

    def result(name: _Name) -> Tensor:
        assert name == to_return[0], name
        if to_return.popleft() != next(iter(sizes)):
            results.popleft()
        start_all_that_fit()
        return results[0].future.result()

    with ThreadPoolExecutor(1) as thread:
        try:
            yield result
        finally:
            thread.shutdown(cancel_futures=True)


def _padded(nbytes: int) -> int:
    """Results begin at multiples of 64 bytes."""
    return -(-nbytes // 64) * 64
