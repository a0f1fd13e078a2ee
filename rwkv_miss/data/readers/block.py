"""What the two stages of a reader hand to each other, and how large things may be."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from rwkv_miss.errors import UserError

BLOCK_SIZE = 1 << 22
"""About as many bytes are in a block of text."""
LONGEST = 1 << 25
"""The most bytes that a record may take in a file, about 8 million tokens: a bound on memory where a file is damaged,
or made to fill it."""

# No text is packed to less than a 200th. What unpacks to more is refused, beyond the first 64 MB.
_MOST_RATIO = 200
_ANY_SIZE = 1 << 26


class Block(NamedTuple):
    """A piece of a data file, from which records are made without the rest of the file. It can be pickled.

    path: the file. first: the number of its first line or row in the file, counted from 1. content: what the reader's
    second stage takes, such as raw lines.
    """

    path: Path
    first: int
    content: Any


def refuse_bomb(path: Path, packed: int, unpacked: int) -> None:
    """UserError if so many packed bytes do not unpack to so many unless they are made for it."""
    if unpacked > _ANY_SIZE + _MOST_RATIO * packed:
        raise UserError(
            f"{path}: unpacks to more than {_MOST_RATIO} times its size, as no text does; if it is meant, unpack it "
            "first, or write it as .jsonl"
        )
