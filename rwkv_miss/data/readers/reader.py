"""Reading a data file: what a reader is, the table of the readers, and what all have in common."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

from rwkv_miss.config import FIELDS, READING, DataOptions
from rwkv_miss.data.readers.arrow import arrow_blocks, arrow_records, parquet_blocks, parquet_records
from rwkv_miss.data.readers.block import Block
from rwkv_miss.data.readers.instead import instead
from rwkv_miss.data.readers.json_array import json_blocks, json_records
from rwkv_miss.data.readers.jsonl import jsonl_blocks, jsonl_records
from rwkv_miss.data.readers.table import csv_blocks, table_records, tsv_blocks
from rwkv_miss.data.readers.text import PACKED, open_text
from rwkv_miss.data.readers.txt import txt_blocks, txt_records
from rwkv_miss.data.records import Record
from rwkv_miss.data.rendering import holds_stop, unused
from rwkv_miss.data.signs import Found, Signs
from rwkv_miss.data.templates import find_template
from rwkv_miss.errors import UserError
from rwkv_miss.files import check_name


class Reader(NamedTuple):
    """A reader of one format, in two stages.

    `blocks(path, file, options)` cuts a file into pieces, in its order: once, in one process, so it does no more than
    cutting takes. `file` is open at its beginning; `path` is where it came from.

    `records(block, options)` makes a piece's records, in their order, in whatever process. It skips nothing that holds
    anything: fields that it does not read are named in `Record.unread`.

    Both raise UserError, naming file and line or row, for what they cannot read.

    options: the names of the options in `READING` that the format has use for. is_text: whether its files are text:
    they may be compressed, and `file` is what they unpack to, after a byte order mark.
    """

    blocks: Callable[[Path, BinaryIO, DataOptions], Iterator[Block]]
    records: Callable[[Block, DataOptions], Iterator[Record]]
    options: tuple[str, ...] = FIELDS
    is_text: bool = True


READERS: dict[str, Reader] = {
    ".jsonl": Reader(jsonl_blocks, jsonl_records),
    ".json": Reader(json_blocks, json_records),
    ".csv": Reader(csv_blocks, table_records),
    ".tsv": Reader(tsv_blocks, table_records),
    ".txt": Reader(txt_blocks, txt_records, options=("separator",)),
    ".parquet": Reader(parquet_blocks, parquet_records, is_text=False),
    ".arrow": Reader(arrow_blocks, arrow_records, is_text=False),
}
"""The readers by the suffix of the files that they read, in lower case. To add a format: one file with a reader, and
one line here."""

_NAMED = 20
"""The most unread fields that a warning names."""

_DEFAULT = DataOptions()
_log = logging.getLogger("rwkv_miss")


@dataclass
class Notes:
    """What is warned of at the end of a file: the fields that were not read, each with the number of records in which
    it holds something, the records with an answer that a runtime cuts, since it holds one of the `stops` of the
    template, and the signs that something is wrong with records.
    """

    records: int = 0
    unread: Counter[str] = field(default_factory=Counter)
    stopped: Found = field(default_factory=Found)
    stops: tuple[str, ...] = ()
    signs: Signs = field(default_factory=Signs)

    def take(self, record: Record, options: DataOptions) -> None:
        """Counts a record."""
        self.records += 1
        self.signs.take(record)
        if names := (*record.unread, *unused(record, options)):
            self.unread.update(names)
        if holds_stop(record, options):
            self.stopped.add(record.where)
            self.stops = find_template(options.template).stops

    def join(self, later: Notes) -> None:
        """Adds what was noted of records that come later in the file."""
        self.records += later.records
        self.unread.update(later.unread)
        self.stopped.join(later.stopped)
        self.stops = self.stops or later.stops
        self.signs.join(later.signs)

    def warn(self, path: Path) -> None:
        if self.unread:
            named = ", ".join(f"{name!r} ({count:,})" for name, count in self.unread.most_common(_NAMED))
            more = f" and {len(self.unread) - _NAMED:,} more" if len(self.unread) > _NAMED else ""
            _log.warning("%s: fields that are not read, with the records that have them: %s%s", path, named, more)
        if self.stopped.count:
            _log.warning(
                "%s: answers hold %s in %s records, the first in %s; they are learned whole, but a runtime stops there "
                "and cuts the rest off",
                *(path, " or ".join(map(repr, self.stops)), f"{self.stopped.count:,}", self.stopped.first),
            )
        for warning in self.signs.warnings():
            _log.warning("%s: %s", path, warning)


def read_records(path: str | Path, options: DataOptions) -> Iterator[Record]:
    """Yields the records of a data file, in its order. `Notes` warns at its end, or where the caller stops.

    Raises:
        UserError: as `read_blocks` and `block_records`, or there is no record in the file.
    """
    path = Path(path)
    notes = Notes()
    try:
        for block in read_blocks(path, options):
            for record in block_records(block, options):
                notes.take(record, options)
                yield record
    except GeneratorExit:
        notes.warn(path)
        raise
    check_not_empty(path, notes)
    notes.warn(path)


def read_blocks(path: Path, options: DataOptions) -> Iterator[Block]:
    """Yields the blocks of a data file, in its order.

    Raises:
        UserError: the options contradict each other or are not for this format, the format is not known, the file
            cannot be read, or whatever its reader refuses.
    """
    if found := options.problems():
        raise UserError("; ".join(found))
    reader = check_file(path)
    refuse_needless(path, given(options), [path])
    try:
        with open_text(path) if reader.is_text else path.open("rb") as file:
            yield from reader.blocks(path, file, options)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error


def block_records(block: Block, options: DataOptions) -> Iterator[Record]:
    """Yields the records of a block, in their order.

    Raises:
        UserError: a record cannot be read, or is none.
    """
    reader = reader_of(block.path)
    assert reader
    try:
        yield from reader.records(block, options)
    except OSError as error:
        raise UserError(f"{block.path}: cannot be read: {error.strerror or error}") from error


def check_not_empty(path: Path, notes: Notes) -> None:
    """UserError if a file that was read to its end had no record."""
    if not notes.records:
        raise UserError(f"{path}: is empty: there is no record in it")


def reader_of(path: Path) -> Reader | None:
    """The reader of a file, by its suffixes; None if there is none."""
    first, last = ("", *path.suffixes)[-2:] if path.suffixes else ("", "")
    if last.lower() not in PACKED:
        return READERS.get(last.lower())
    reader = READERS.get(first.lower())
    return reader if reader and reader.is_text else None


def check_file(path: Path) -> Reader:
    """The reader of a file that is there and can be read.

    Raises:
        UserError: there is none, which says what to do instead.
    """
    check_name(path, "data")
    reader = reader_of(path)
    if said := instead(path, READERS, reader is not None):
        raise UserError(f"{path}: {said}")
    assert reader
    return reader


def given(options: DataOptions) -> list[str]:
    """The names in `READING` of the options that are given."""
    return [name for name in READING if getattr(options, name) != getattr(_DEFAULT, name)]


def options_of(path: Path) -> tuple[str, ...]:
    """The names of the options that a file's format has use for. A binidx has use for none."""
    reader = reader_of(path)
    return reader.options if reader else ()


def refuse_needless(name: object, given: Iterable[str], files: Iterable[Path]) -> None:
    """UserError if none of the files, which `name` stands for, has use for one of the options of these names."""
    used = {option for file in files for option in options_of(file)}
    if needless := [option for option in given if option not in used]:
        users = [suffix for suffix, reader in READERS.items() if needless[0] in reader.options]
        raise UserError(f"{name}: {' and '.join(needless)} can only be given for {', '.join(users)}; leave it out")
