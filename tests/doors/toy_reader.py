"""A reader, added as CONTRIBUTING.md describes: a line of questions and answers, `2+2=4;3+3=6`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from rwkv_miss.config import DataOptions
from rwkv_miss.data.records import Record, Turn
from rwkv_miss.errors import UserError


def read_sums(path: Path, file: BinaryIO, options: DataOptions) -> Iterator[Record]:
    for number, pair in enumerate(file.read().decode().strip().split(";"), start=1):
        question, equals, answer = pair.partition("=")
        if not equals:
            raise UserError(f"{path}: sum {number} is {pair!r}; expected QUESTION=ANSWER")
        yield Record(f"{path}:{number}", (Turn("user", question), Turn("assistant", answer)))
