"""What the option `data` names: files, folders, patterns of names and data sets, each with a weight and with options of
how its files are read."""

from __future__ import annotations

import glob
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from rwkv_miss.config import FIELDS, READING, Data, DataOptions
from rwkv_miss.data.binidx import binidx_prefix
from rwkv_miss.data.hugging_face import BESIDE_DATA, hub_files, is_on_the_hub, saved_files
from rwkv_miss.data.readers.reader import (
    READERS,
    check_file,
    given,
    options_of,
    read_records,
    reader_of,
    refuse_needless,
)
from rwkv_miss.data.records import Record
from rwkv_miss.errors import UserError
from rwkv_miss.files import check_name

# The most files and folders that are looked through for data, and the most sources in one string.
_MOST_NAMES = 100_000
_MOST_PARTS = 100
_LEAST_WEIGHT, _LARGEST_WEIGHT = 0.001, 1000
# The most files that a message names.
_NAMED = 5
_DEFAULT = DataOptions()
_log = logging.getLogger("rwkv_miss")


@dataclass(frozen=True)
class Source:
    """Files that are read with the same options.

    name: what the user called them, without the weight. files: in the order in which they are read; a binidx is there
    as its .idx. weight: how often each of their rows comes in an epoch; 0.5 is every second epoch. options: without
    those that these files have no use for. skipped: what else is where the files were found, and is not read.
    """

    name: str
    files: tuple[Path, ...]
    weight: float
    options: DataOptions
    skipped: tuple[Path, ...] = ()


class _Entry(NamedTuple):
    """A source as the user gave it: `own` are its own options."""

    name: str
    weight: float
    own: dict[str, Any]


def parse_sources(data: Data, options: DataOptions, weights: bool = True) -> list[Source]:
    """What `data` names, in its order. Files of one name are parted where their formats have other options.

    Looks at names, not into files, except those that describe a data set. A data set of a hub is downloaded.

    Args:
        data: as `TrainConfig.data`.
        options: those of sources that have none of their own.
        weights: whether sources may have weights.

    Raises:
        UserError: something is missing or of a kind that is not read, an entry has something that no source has, or its
            own options are of no use to its files.
    """
    sources: list[Source] = []
    for name, weight, own in _entries(data):
        if weight != 1 and not weights:
            raise UserError(f"{name}: has the weight {weight:g}; only training data have weights: leave it out")
        files, skipped = _find(name)
        refuse_needless(name, own, files)
        mine = _with_own(options, own)
        if found := mine.problems():
            raise UserError(f"{name}: {'; '.join(found)}")
        for used in dict.fromkeys(map(options_of, files)):
            alike = tuple(file for file in files if options_of(file) == used)
            sources.append(Source(name, alike, weight, _only(used, mine), tuple(skipped)))
            skipped = []
    return sources


def check_sources(sources: Sequence[Source], options: DataOptions) -> None:
    """Tells what is beside the data in folders and is not read.

    Args:
        sources: all of a command.
        options: those that the user gave for all.

    Raises:
        UserError: an option is of no use to any of their files.
    """
    files = [file for source in sources for file in source.files]
    refuse_needless(sources[0].name, given(options), files)
    for source in sources:
        if source.skipped:
            named = ", ".join(map(str, source.skipped[:_NAMED]))
            more = f" and {len(source.skipped) - _NAMED:,} more" if len(source.skipped) > _NAMED else ""
            _log.info("%s: what is no data is not read: %s%s", source.name, named, more)


def refuse_binidx(sources: Iterable[Source]) -> None:
    """UserError if one of the files is a binidx."""
    for file in (file for source in sources for file in source.files):
        if binidx_prefix(file):
            raise UserError(f"{file}: is a binidx, which has tokens but no records; give what it was made of")


def source_records(sources: Sequence[Source]) -> Iterator[Record]:
    """Yields the records of sources, whatever their weights.

    Raises:
        UserError: as `read_records` and `refuse_binidx`.
    """
    refuse_binidx(sources)
    for source in sources:
        for file in source.files:
            yield from read_records(file, source.options)


def data_name(data: Data) -> str:
    """What messages call the sources together."""
    return data if isinstance(data, str) else ", ".join(entry.name for entry in _entries(data))


def _entries(data: Data) -> list[_Entry]:
    found = [_entry(item) for item in (_split(data) if isinstance(data, str) else data)]
    if not found:
        raise UserError("data is an empty list; give at least one source")
    return found


def _split(data: str) -> list[str]:
    """The sources in a string, with their weights. A name that is there is one, whatever commas it has."""
    if _is_there(data):
        return [data]
    parts = data.split(",")
    if len(parts) > _MOST_PARTS:
        raise UserError(f"data has {len(parts):,} parts between commas; give a folder, or a list in a YAML file")
    found = []
    while parts:
        ends = range(len(parts), 1, -1)
        n = next((n for n in ends if _is_there(_weighted(",".join(parts[:n]))[0])), 1)
        found.append(",".join(parts[:n]))
        del parts[:n]
    return found


def _entry(item: Any) -> _Entry:
    """The source that an item of a list means."""
    own = dict(item) if isinstance(item, dict) else {"path": item}
    name, weight = own.pop("path", None), own.pop("weight", None)
    if not isinstance(name, str) or not name.strip():
        raise UserError(f"data: a source is {item!r:.100}; give a name, or an object with a path")
    if isinstance(item, str):
        name, weight = _weighted(name)
    weight = 1 if weight is None else weight
    if type(weight) not in (int, float) or not _LEAST_WEIGHT <= weight <= _LARGEST_WEIGHT:
        limits = f"from {_LEAST_WEIGHT} to {_LARGEST_WEIGHT}"
        raise UserError(f"{name}: the weight is {weight!r:.20}; it must be a number {limits}")
    for option, value in own.items():
        if option not in READING:
            raise UserError(f"{name}: a source has no {option!r}; it has path, weight, {', '.join(READING)}")
        if not isinstance(value, str):
            raise UserError(f"{name}: {option} is {value!r:.100}; it must be text")
    return _Entry(name, weight, own)


def _weighted(text: str) -> tuple[str, float | None]:
    """The name and the weight in NAME:WEIGHT; a name that is there has none."""
    name, colon, number = text.rpartition(":")
    if not colon or _is_there(text):
        return text, None
    try:
        return name, float(number)
    except ValueError:  # the split of a data set
        return text, None


def _is_there(name: str) -> bool:
    return any(os.path.exists(f"{name}{suffix}") for suffix in ("", ".idx", ".bin"))


def _with_own(options: DataOptions, own: dict[str, Any]) -> DataOptions:
    """The options with a source's own in their place. Fields are named together or not at all."""
    unnamed = {name: getattr(_DEFAULT, name) for name in FIELDS} if own.keys() & set(FIELDS) else {}
    return replace(options.of_data(), **unnamed | own)


def _only(used: Iterable[str], options: DataOptions) -> DataOptions:
    return replace(options, **{name: getattr(_DEFAULT, name) for name in READING if name not in used})


def _find(name: str) -> tuple[list[Path], list[Path]]:
    """The files that a name means, and what else is there that no reader reads.

    Raises:
        UserError: there is none, or one cannot be read.
    """
    path = Path(name)
    if prefix := binidx_prefix(name):
        return [Path(f"{prefix}.idx")], []
    check_name(path, "data")
    try:
        if path.is_dir():
            found = _in_folder(path)
        elif glob.has_magic(name) and not path.exists():
            found = _matching(name)
        elif is_on_the_hub(name) and not path.exists() and not reader_of(path):
            found = iter(hub_files(name))
        else:
            check_file(path)
            return [path], []
        several = sorted({os.path.realpath(file): file for file in map(_as_binidx, found)}.values())
    except OSError as error:
        raise UserError(f"{error.filename or name}: cannot be read: {error.strerror or error}") from error
    files = [file for file in several if reader_of(file) or _is_binidx(file)]
    if not files:
        raise UserError(f"{name}: no file is there that is read; give {', '.join(READERS)} files, or a binidx")
    for file in files:
        if not _is_binidx(file):
            check_file(file)
    return files, [file for file in several if file not in set(files)]


def _is_binidx(path: Path) -> bool:
    return path.suffix == ".idx" and path.with_suffix(".bin").is_file()


def _as_binidx(path: Path) -> Path:
    """The index, for the tokens of a binidx; any other path as it is."""
    index = path.with_suffix(".idx") if path.suffix == ".bin" else path
    return index if index.is_file() else path


def _in_folder(folder: Path) -> Iterator[Path]:
    """The files in a folder and in those below it, through links too, but none that is hidden."""
    seen, count = set(), 0
    for here, folders, names in os.walk(folder, followlinks=True, onerror=_raise):
        count += len(folders) + len(names)
        if count > _MOST_NAMES:
            raise UserError(f"{folder}: has more than {_MOST_NAMES:,} files and folders; give a folder of data alone")
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        status = os.stat(here)
        is_new = (status.st_dev, status.st_ino) not in seen
        seen.add((status.st_dev, status.st_ino))
        saved = saved_files(Path(here)) if is_new else []
        if saved is not None:
            folders.clear()
            yield from saved
            continue
        yield from (Path(here, name) for name in names if not name.startswith(".") and name not in BESIDE_DATA)


def _matching(pattern: str) -> Iterator[Path]:
    """The files of names that match, and those in folders that do."""
    for count, match in enumerate(glob.iglob(pattern, recursive=True)):
        if count == _MOST_NAMES:
            raise UserError(f"{pattern}: more than {_MOST_NAMES:,} names match; give a folder of data alone")
        path = Path(match)
        yield from _in_folder(path) if path.is_dir() else [path]


def _raise(error: OSError) -> NoReturn:
    raise error
