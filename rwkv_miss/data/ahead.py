"""Work in stages, each of which is done for some items in a row."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TypeVar

from rwkv_miss.errors import UserError

_T = TypeVar("_T")

# More gain nothing.
_COUNT = 64


def ahead(items: Iterable[_T]) -> Iterator[_T]:
    """Yields the items, of which some are made before the first of them is given on. A core has in its caches what one
    stage of the work needs, but not what all need: gone through item by item they take up to a quarter longer.

    Raises:
        UserError: as making an item does, after the items before it were yielded.
    """
    source = iter(items)
    while True:
        made, failed = [], None
        try:
            for item in islice(source, _COUNT):
                made.append(item)
        except UserError as error:
            failed = error
        yield from made
        if failed is not None:
            raise failed
        if len(made) < _COUNT:
            return
