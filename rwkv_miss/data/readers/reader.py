"""Reading a data file: what a reader is, the table of the readers, and what all have in common."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from rwkv_miss.config import DataOptions
from rwkv_miss.data.readers.instead import instead
from rwkv_miss.data.readers.jsonl import read_jsonl
from rwkv_miss.data.readers.txt import read_txt
from rwkv_miss.data.records import Record
from rwkv_miss.data.rendering import holds_stop, unused
from rwkv_miss.data.signs import Signs
from rwkv_miss.data.templates import find_template
from rwkv_miss.errors import UserError
from rwkv_miss.files import check_name

Reader = Callable[[Path, BinaryIO, DataOptions], Iterator[Record]]
"""A reader of one format: (path, file, options) -> the file's records in its order.

`file` is open at its beginning; `path` is where it came from, for messages and for `Record.where`. A reader refuses
options that its format has no use for and raises UserError, naming file and line or row, for what it cannot read. It
skips nothing that holds anything: fields that it does not read are named in `Record.unread`."""

READERS: dict[str, Reader] = {
    ".jsonl": read_jsonl,
    ".txt": read_txt,
}
"""The readers by the suffix of the files that they read, in lower case. To add a format: one file with a reader, and
one line here."""

_NAMED = 20
"""The most unread fields that a warning names."""

_log = logging.getLogger("rwkv_miss")


def read_records(path: str | Path, options: DataOptions) -> Iterator[Record]:
    """Yields the records of a data file, in its order.

    At the end of the file, or where the caller stops, one warning names the fields that were not read, each with the
    number of records in which it holds something; another counts the records with an answer that a runtime cuts,
    since it holds a string that stops an answer; and there may be those of `Signs`.

    Raises:
        UserError: the options contradict each other, the format is not known, the file cannot be read or holds no
            record, or whatever its reader refuses.
    """
    if found := options.problems():
        raise UserError("; ".join(found))
    path = Path(path)
    if said := instead(path, [*READERS]):
        raise UserError(f"{path}: {said}")
    check_name(path, "data")
    unread: Counter[str] = Counter()
    records = stopped = 0
    first_stopped = ""
    signs = Signs()
    try:
        with path.open("rb") as file:
            for record in READERS[path.suffix.lower()](path, file, options):
                records += 1
                signs.take(record)
                if names := (*record.unread, *unused(record, options)):
                    unread.update(names)
                if holds_stop(record, options):
                    stopped += 1
                    first_stopped = first_stopped or record.where
                yield record
    except GeneratorExit:
        _warn(path, options, unread, stopped, first_stopped, signs)
        raise
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    if not records:
        raise UserError(f"{path}: is empty: there is no record in it")
    _warn(path, options, unread, stopped, first_stopped, signs)


def _warn(
    path: Path, options: DataOptions, unread: Counter[str], stopped: int, first_stopped: str, signs: Signs
) -> None:
    if unread:
        named = ", ".join(f"{name!r} ({count:,})" for name, count in unread.most_common(_NAMED))
        more = f" and {len(unread) - _NAMED:,} more" if len(unread) > _NAMED else ""
        _log.warning("%s: fields that are not read, with the records that have them: %s%s", path, named, more)
    if stopped:
        _log.warning(
            "%s: answers hold %s in %s records, the first in %s; they are learned whole, but a runtime stops there and "
            "cuts the rest off",
            *(path, " or ".join(map(repr, find_template(options.template).stops)), f"{stopped:,}", first_stopped),
        )
    for warning in signs.warnings():
        _log.warning("%s: %s", path, warning)
