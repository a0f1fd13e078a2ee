"""The cache of tokens. A file is read and tokenised once for the same settings; all processes map the same arrays.

An entry is a folder, named by a hash of everything that its tokens depend on: the arrays of a store, and entry.json
with what `open_store` needs to know, the warnings that reading gave, and the settings, for people.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from filelock import Timeout
from xxhash import xxh3_128

from rwkv_miss.data.collecting import collected_warnings
from rwkv_miss.data.corpus import Corpus, id_dtype, read_tokens
from rwkv_miss.data.store import Store, open_store, store_in_memory, write_store
from rwkv_miss.data.tokenizers import load_tokenizer
from rwkv_miss.files import cache_folder, locked, part_path, put_in_place, remove

# Entries that no run has used for so many days are removed when another one is written.
_UNUSED_DAYS = 30
# Seconds that a process waits for another before it says so.
_PATIENCE = 10.0
_PACKAGES = ("numpy", "pyrwkv-tokenizer", "tokenizers")

_log = logging.getLogger("rwkv_miss")


def cached_store(corpus: Corpus) -> Store:
    """The tokens of files, from the cache if a process of this user has read the same ones with the same settings
    before; otherwise they are read, while others that need the same wait. Warnings of the reading are given either way.

    Where the cache cannot be written, the tokens stay in memory, with a warning.

    Raises:
        UserError: as `read_tokens`.
    """
    key = _key(corpus)
    if key is None:
        return _in_memory(corpus)
    entry = cache_folder() / "data" / key
    found = _open(entry, corpus.name)
    if found is None:
        try:
            waited = _waited(entry, corpus.name)
        except (OSError, NotImplementedError) as error:  # NotImplementedError: a file system without locks
            return _without_cache(corpus, entry, error)
        with waited:
            found = _open(entry, corpus.name)  # the process that was waited for may have made it
            if found is None:
                try:
                    return _make(entry, corpus)
                except OSError as error:
                    return _without_cache(corpus, entry, error)
    store, warnings = found
    for warning in warnings:
        _log.warning("%s", warning)
    return store


def _in_memory(corpus: Corpus) -> Store:
    return store_in_memory(corpus.name, read_tokens(corpus))


def _key(corpus: Corpus) -> str | None:
    """A hash of all that the tokens depend on: the settings, the content of the data and of the tokenizer, and the code
    that makes tokens of them. None if one is no file that can be read twice; reading it may say why.

    The files' names are among the settings, because their suffixes choose the readers and warnings have them.
    """
    data, tokenizer = [Path(file) for file in corpus.files], Path(corpus.tokenizer)
    code = sorted(Path(__file__).parent.rglob("*.py"))
    try:
        if not all(path.is_file() for path in data):
            return None
        content = [_hash_file(path) for path in (*data, tokenizer, *code) if path.is_file()]
    except OSError:
        return None
    versions = [version(package) for package in _PACKAGES]
    return hashlib.sha256(json.dumps([asdict(corpus), content, versions]).encode()).hexdigest()


def _hash_file(path: Path) -> str:
    digest = xxh3_128()  # 30 times as fast as SHA-256, and every rank of every run hashes all of its data
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


def _make(entry: Path, corpus: Corpus) -> Store:
    """Reads the file and writes the entry, in place of a damaged one: beside its place, which it gets at once. An entry
    of a file that was written to while it was read is removed, and is there for as long as it is mapped.

    Raises:
        OSError: the disk refused. Nothing is left then.
    """
    if entry.exists():
        _log.warning("%s: is damaged, so %s is read again", entry, corpus.name)
    _remove_unused(entry.parent)
    for left in entry.parent.glob(f".{entry.name}.*.part"):  # by a process that was killed: the lock is held here
        remove(left)
    folder = part_path(entry)
    try:
        folder.mkdir()
        with _noted() as warnings, closing(read_tokens(corpus)) as parts:
            written = write_store(folder, parts, id_dtype(load_tokenizer(corpus.tokenizer)))
        if _key(corpus) == entry.name:
            content = {"settings": asdict(corpus), "warnings": warnings, "store": written}
            (folder / "entry.json").write_text(json.dumps(content, indent=1))
            remove(entry)
            put_in_place(folder, entry)
            folder = entry
        return open_store(folder, corpus.name, written)
    finally:
        if folder != entry:
            with suppress(OSError):
                remove(folder)


@contextmanager
def _noted() -> Iterator[list[str]]:
    """Collects the package's warnings, for whichever process opens the entry, and gives them at the end."""
    found: list[str] = []
    try:
        with collected_warnings() as found:
            yield found
    finally:
        for warning in found:
            _log.warning("%s", warning)


def _without_cache(corpus: Corpus, entry: Path, error: Exception) -> Store:
    reason = getattr(error, "strerror", None) or error
    _log.warning("%s: tokens cannot be cached (%s); each process keeps its own in memory", entry.parent, reason)
    return _in_memory(corpus)


def _remove_unused(folder: Path) -> None:
    """Removes the entries that were not used for long, and what processes that were killed have left."""
    limit = time.time() - _UNUSED_DAYS * 24 * 3600
    for path in folder.iterdir():
        with suppress(OSError):  # another process may remove it at the same time
            if path.is_dir() and path.stat().st_mtime < limit:
                remove(path)


def _open(entry: Path, name: str) -> tuple[Store, list[str]] | None:
    """The store of an entry, mapped, and the warnings that reading gave; None if it is not there or damaged."""
    try:
        content = json.loads((entry / "entry.json").read_text())
        store, warnings = open_store(entry, name, content["store"]), content["warnings"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    with suppress(OSError):  # in a folder that cannot be written nothing is removed either
        os.utime(entry)
    return store, warnings
