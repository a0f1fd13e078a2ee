"""What the two stages of a reader hand to each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple


class Block(NamedTuple):
    """A piece of a data file, from which records are made without the rest of the file. It can be pickled.

    path: the file. first: the number of its first line or row in the file, counted from 1. content: what the reader's
    second stage takes, such as raw lines.
    """

    path: Path
    first: int
    content: Any
