"""The cache of rows. A file is read and tokenised once for the same settings; all processes map the same arrays.

An entry is a folder, named by a hash of everything that its rows depend on: the arrays of each part as .npy, and
entry.json with their dtypes and shapes, the reports, the warnings that reading gave, and the settings, for people.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from filelock import Timeout

from rwkv_miss.data.binidx import binidx_prefix
from rwkv_miss.data.packing import AnyRows, PackReport, Rows
from rwkv_miss.data.parts import Part, PartSettings, read_parts
from rwkv_miss.files import cache_folder, locked, part_path, put_in_place, remove

# Entries that no run has used for so many days are removed when another one is written.
_UNUSED_DAYS = 30
# Seconds that a process waits for another before it says so.
_PATIENCE = 10.0
_PACKAGES = ("numpy", "pyrwkv-tokenizer", "tokenizers")

_log = logging.getLogger("rwkv_miss")


@dataclass(frozen=True, slots=True, eq=False)
class CachedRows:
    """Rows whose arrays are mapped from files; see `AnyRows`. What takes a pass over all of them was computed when they
    were made."""

    rows: Rows
    mark: str
    loss_tokens: np.ndarray
    used: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def fingerprint(self) -> str:
        return self.mark

    @property
    def width(self) -> int:
        return self.rows.width

    @property
    def filled(self) -> np.ndarray:
        return self.rows.filled

    @property
    def groups(self) -> np.ndarray | None:
        return self.rows.groups

    def has_loss(self, rows: np.ndarray, columns: slice) -> bool:
        return self.rows.has_loss(rows, columns)

    def check(self, rows: np.ndarray) -> None:
        self.rows.check(rows)

    def take(self, rows: np.ndarray) -> Rows:
        return self.rows.take(rows)


def cached_parts(settings: PartSettings) -> list[Part]:
    """What `read_parts` returns, from the cache if a process of this user has read the same file with the same settings
    before; otherwise it is read, while others that need the same wait. Warnings of the reading are given either way.

    A binidx is mapped itself and is not cached. Where the cache cannot be written, the rows stay in memory, with a
    warning.

    Raises:
        UserError: as `read_parts`.
    """
    key = None if binidx_prefix(settings.data) else _key(settings)
    if key is None:
        return read_parts(settings)
    entry = cache_folder() / "data" / key
    found = _open(entry)
    if found is None:
        try:
            waited = _waited(entry, settings.data)
        except (OSError, NotImplementedError) as error:  # NotImplementedError: a file system without locks
            _warn_without_cache(entry, error)
            return read_parts(settings)
        with waited:
            found = _open(entry)  # the process that was waited for may have made it
            if found is None:
                return _make(entry, settings)
    parts, warnings = found
    for warning in warnings:
        _log.warning("%s", warning)
    return parts


def _key(settings: PartSettings) -> str | None:
    """A hash of all that the rows depend on: the settings, the content of the data and of the tokenizer, and the code
    that makes rows of them. None if the data is no file that can be read twice; reading it may say why.

    The file's name is among the settings, because its suffix chooses the reader and warnings have it.
    """
    data, tokenizer = Path(settings.data), Path(settings.tokenizer)
    code = sorted(Path(__file__).parent.rglob("*.py"))
    try:
        if not data.is_file():
            return None
        content = [_hash_file(path) for path in (data, tokenizer, *code) if path.is_file()]
    except OSError:
        return None
    versions = [version(package) for package in _PACKAGES]
    return hashlib.sha256(json.dumps([asdict(settings), content, versions]).encode()).hexdigest()


def _hash_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _waited(entry: Path, data: str) -> AbstractContextManager:
    """A context in which no other process makes this entry. A lock has one of 256 names, so that locks do not pile up;
    that unrelated entries sometimes wait for each other is harmless.

    Raises:
        OSError, NotImplementedError: the folder cannot be written, or has no locks.
    """
    lock = locked(entry.parent / f"{entry.name[:2]}.lock")
    try:
        return lock.acquire(timeout=_PATIENCE)
    except Timeout:
        _log.info("%s: waiting for another process, which is reading it", data)
        return lock.acquire()


def _make(entry: Path, settings: PartSettings) -> list[Part]:
    """Reads the parts and writes the entry, in place of a damaged one. Returns them as mapped, or as read if they
    cannot be kept."""
    if entry.exists():
        _log.warning("%s: is damaged, so %s is read again", entry, settings.data)
    with _noted() as warnings:
        parts = read_parts(settings)
    if _key(settings) != entry.name:  # the file was written to while it was read
        return parts
    try:
        _remove_unused(entry.parent)
        _write(entry, parts, warnings, settings)
    except OSError as error:
        _warn_without_cache(entry, error)
        return parts
    found = _open(entry)
    return found[0] if found else parts


@contextmanager
def _noted() -> Iterator[list[str]]:
    """Collects the package's warnings, and gives them at the end.

    Also in a process that shows none: the warnings in an entry are for whichever process opens it.
    """
    found: list[str] = []

    def passes(record: logging.LogRecord) -> bool:
        if record.levelno == logging.WARNING:
            found.append(record.getMessage())
        return record.levelno != logging.WARNING

    level = _log.level
    _log.addFilter(passes)
    if not _log.isEnabledFor(logging.WARNING):
        _log.setLevel(logging.WARNING)
    try:
        yield found
    finally:
        _log.removeFilter(passes)
        _log.setLevel(level)
        for warning in found:
            _log.warning("%s", warning)


def _warn_without_cache(entry: Path, error: Exception) -> None:
    reason = getattr(error, "strerror", None) or error
    _log.warning("%s: rows cannot be cached (%s); each process keeps its own in memory", entry.parent, reason)


def _remove_unused(folder: Path) -> None:
    """Removes the entries that were not used for long, and what processes that were killed have left."""
    limit = time.time() - _UNUSED_DAYS * 24 * 3600
    for path in folder.iterdir():
        with suppress(OSError):  # another process may remove it at the same time
            if path.is_dir() and path.stat().st_mtime < limit:
                remove(path)


def _write(entry: Path, parts: list[Part], warnings: list[str], settings: PartSettings) -> None:
    """Writes an entry beside its place and gives it its name at once.

    Raises:
        OSError: the disk refused. Nothing is left then.
    """
    for left in entry.parent.glob(f".{entry.name}.*.part"):  # by a process that was killed: the lock is held here
        remove(left)
    folder = part_path(entry)
    try:
        folder.mkdir()
        written = []
        for number, (rows, report) in enumerate(parts):
            assert isinstance(rows, Rows)
            arrays = {name: array for name in Rows.__slots__ if (array := getattr(rows, name)) is not None}
            arrays |= {"loss_tokens": rows.loss_tokens, "used": rows.used}
            for name, array in arrays.items():
                np.save(folder / f"{number}-{name}.npy", array)
            shapes = {name: [array.dtype.str, list(array.shape)] for name, array in arrays.items()}
            written.append({"arrays": shapes, "mark": rows.fingerprint(), "report": asdict(report)})
        content = {"settings": asdict(settings), "warnings": warnings, "parts": written}
        (folder / "entry.json").write_text(json.dumps(content, indent=1))
        remove(entry)
        put_in_place(folder, entry)
    finally:
        with suppress(OSError):  # it is not there after success
            remove(folder)


def _open(entry: Path) -> tuple[list[Part], list[str]] | None:
    """The parts of an entry, mapped, and the warnings that reading gave; None if it is not there or damaged."""
    try:
        content = json.loads((entry / "entry.json").read_text())
        parts = [_open_part(entry, number, described) for number, described in enumerate(content["parts"])]
        warnings = content["warnings"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    with suppress(OSError):  # in a folder that cannot be written nothing is removed either
        os.utime(entry)
    return parts, warnings


def _open_part(entry: Path, number: int, described: dict[str, Any]) -> tuple[AnyRows, PackReport]:
    """Raises OSError, ValueError, KeyError or TypeError if the files are not what entry.json says."""
    arrays = {}
    for name, [dtype, shape] in described["arrays"].items():
        array = np.lib.format.open_memmap(entry / f"{number}-{name}.npy", mode="r")
        if [array.dtype.str, list(array.shape)] != [dtype, shape]:
            raise ValueError(f"{name} is another array")
        arrays[name] = array
    loss_tokens, used = arrays.pop("loss_tokens"), arrays.pop("used")
    return CachedRows(Rows(**arrays), described["mark"], loss_tokens, used), PackReport(**described["report"])
