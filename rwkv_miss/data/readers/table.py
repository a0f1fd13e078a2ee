"""Tables as text: .csv and .tsv, whose first row names the columns."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import BinaryIO

from rwkv_miss.config import DataOptions
from rwkv_miss.data.readers.block import BLOCK_SIZE, LONGEST, Block
from rwkv_miss.data.readers.fields import record_of
from rwkv_miss.data.readers.text import decoded_line
from rwkv_miss.data.records import Record
from rwkv_miss.errors import UserError


def csv_blocks(path: Path, file: BinaryIO, options: DataOptions) -> Iterator[Block]:
    """The names of the columns, and some rows. Columns are parted by commas; by semicolons or tabs if the first line
    has no comma but these, as spreadsheets write them in many countries."""
    return _blocks(path, file, ",;\t")


def tsv_blocks(path: Path, file: BinaryIO, options: DataOptions) -> Iterator[Block]:
    """The names of the columns, which are parted by tabs, and some rows."""
    return _blocks(path, file, "\t")


def table_records(block: Block, options: DataOptions) -> Iterator[Record]:
    """A record for each row that is not blank; see `record_of` for the fields. The header is row 1."""
    names, rows = block.content
    for number, row in enumerate(rows, start=block.first):
        if row:
            yield record_of(f"{block.path}:{number}", dict(zip(names, row, strict=True)), options)


def _blocks(path: Path, file: BinaryIO, delimiters: str) -> Iterator[Block]:
    number = size = 0  # of rows; of bytes since the last of them ended

    def lines() -> Iterator[str]:
        nonlocal size
        for line, raw in enumerate(iter(lambda: file.readline(LONGEST + 1), b""), start=1):
            size += len(raw)
            if size > LONGEST:
                said = f"is longer than {LONGEST:,} bytes; no record may be. Is a quotation mark missing?"
                raise UserError(f"{path}:{number + 1}: {said}")
            yield decoded_line(path, line, raw)

    source = lines()
    header = next(source, "")
    delimiter = next((sign for sign in delimiters if sign in header), delimiters[0])
    csv.field_size_limit(LONGEST)
    names: list[str] | None = None
    rows: list[list[str]] = []
    taken = 0
    try:
        for row in csv.reader(chain([header], source), delimiter=delimiter, strict=True):
            number += 1
            taken, size = taken + size, 0
            if names is None:
                names = _checked(path, number, row) if row else None
                continue
            if row and len(row) != len(names):
                raise UserError(
                    f"{path}:{number}: has {len(row)} columns, the header has {len(names)} ({delimiter!r} parts them); "
                    f"put quotation marks around text that holds {delimiter!r}"
                )
            rows.append(row)
            if taken >= BLOCK_SIZE:
                yield Block(path, number + 1 - len(rows), (names, rows))
                rows, taken = [], 0
    except csv.Error as error:
        raise UserError(f"{path}:{number + 1}: is not a row of a table ({error})") from error
    if rows:
        yield Block(path, number + 1 - len(rows), (names, rows))


def _checked(path: Path, number: int, names: list[str]) -> list[str]:
    """The header. Raises UserError if a name is there twice."""
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise UserError(f"{path}:{number}: the header names {twice[0]!r} twice; the first row has to name the columns")
    return names
