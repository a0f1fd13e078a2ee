"""A reader, added as CONTRIBUTING.md describes: a line of questions and answers, `2+2=4;3+3=6`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from rwkv_miss.config import DataOptions
from rwkv_miss.data.readers.block import Block
from rwkv_miss.data.records import Record, Turn
from rwkv_miss.errors import UserError


def sums_blocks(path: Path, file: BinaryIO, options: DataOptions) -> Iterator[Block]:
    """Each sum as text."""
    for number, pair in enumerate(file.read().decode().strip().split(";"), start=1):
        yield Block(path, number, pair)


def sums_records(block: Block, options: DataOptions) -> Iterator[Record]:
    question, equals, answer = block.content.partition("=")
    if not equals:
        raise UserError(f"{block.path}: sum {block.first} is {block.content!r}; expected QUESTION=ANSWER")
    yield Record(f"{block.path}:{block.first}", (Turn("user", question), Turn("assistant", answer)))
