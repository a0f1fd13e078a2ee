"""Token stores: all documents of a source one after the other, as flat arrays, in memory or mapped from files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from xxhash import xxh3_128

from rwkv_miss.errors import UserError

_ARRAYS = ("ids", "offsets", "edges")


class Tokens(NamedTuple):
    """Some documents, one after the other: the ids (N,) of all, and the lengths int64 (documents,) of each.

    edges int64 (2 * stretches,), ascending: the tokens from edges[2 * i] up to edges[2 * i + 1] carry loss, unless they
    are the first of their document, which is no target.
    """

    ids: np.ndarray
    lengths: np.ndarray
    edges: np.ndarray


@dataclass(frozen=True, eq=False)
class Store:
    """Documents of tokens: document i is ids[offsets[i]:offsets[i + 1]].

    name: what messages call it. ids (N,), of any integer dtype. offsets int64 (documents + 1,). edges: as in `Tokens`.
    mark: an xxh3 hash (128 bits, hex) of ids and edges; None if there may be too many to read them all.
    vocab_size: the number of ids that the model has, if they are to be checked when they are used; None if they were
    checked before.
    """

    name: str
    ids: np.ndarray
    offsets: np.ndarray
    edges: np.ndarray
    mark: str | None = None
    vocab_size: int | None = None

    @property
    def documents(self) -> int:
        """How many documents there are."""
        return len(self.offsets) - 1

    @cached_property
    def _before(self) -> np.ndarray:
        """The tokens with loss before each stretch of them, and in all, int64 (stretches + 1,)."""
        return np.concatenate([[0], np.cumsum(self.edges[1::2] - self.edges[::2])])

    def learned_before(self, places: np.ndarray) -> np.ndarray:
        """How many of the tokens before each place carry loss, int64 (places,)."""
        stretches, is_inside = np.divmod(np.searchsorted(self.edges, places), 2)
        inside = np.flatnonzero(is_inside)
        found = self._before[stretches]
        found[inside] += places[inside] - self.edges[2 * stretches[inside]]
        return found

    def next_learned(self, places: np.ndarray) -> np.ndarray:
        """The first token from each place on that carries loss, or the end of the store, int64 (places,)."""
        edges = np.searchsorted(self.edges, places, side="right")
        return np.where(edges % 2, places, np.append(self.edges, len(self.ids))[edges])

    def last_learned(self, places: np.ndarray) -> np.ndarray:
        """The last token before each place that carries loss, or -1, int64 (places,)."""
        edges = np.searchsorted(self.edges, places)
        return np.where(edges % 2, places, np.append(self.edges, 0)[edges - 1]) - 1

    def mask(self, start: int, stop: int) -> np.ndarray:
        """Whether each of ids[start:stop] carries loss, bool (stop - start,)."""
        first, last = np.searchsorted(self.edges, [start, stop])
        before = first + np.searchsorted(self.edges[first:last], np.arange(start, stop), side="right")
        return before % 2 == 1

    def read(self, start: int, stop: int) -> np.ndarray:
        """ids[start:stop] as int32. Raises UserError if one is not in the vocabulary."""
        ids = self.ids[start:stop]
        self.check(ids, range(start, stop))
        return ids.astype(np.int32)

    def check(self, ids: np.ndarray, places: np.ndarray | range) -> None:
        """Raises UserError if one of `ids`, which stand at `places` in the store, is not in the vocabulary."""
        if self.vocab_size is not None and ids.size and not 0 <= ids.min() <= ids.max() < self.vocab_size:
            i = int(np.argmax((ids < 0) | (ids >= self.vocab_size)))
            document = int(np.searchsorted(self.offsets, places[i], side="right")) - 1
            raise UserError(
                f"{self.name}: document {document} (of 0 to {self.documents - 1}): token {ids[i]} is not in the "
                f"model's vocabulary of {self.vocab_size} ids; make the binidx again with the model's tokenizer"
            )


def edges_of(mask: np.ndarray) -> np.ndarray:
    """Where the stretches of true in a mask, bool (N,), begin and end, as in `Tokens`."""
    return np.flatnonzero(np.diff(mask, prepend=False, append=False))


def store_in_memory(name: str, parts: Iterable[Tokens]) -> Store:
    """A store of at least one part."""
    digest = _Digest()
    ids, offsets, edges = (np.concatenate(arrays) for arrays in zip(*_joined(parts, digest), strict=True))
    return Store(name, ids, offsets, edges, digest.mark())


def write_store(folder: Path, parts: Iterable[Tokens], dtype: np.dtype | type) -> dict[str, Any]:
    """Writes the arrays of a store into a folder, part by part, with ids of `dtype`.

    Returns:
        What `open_store` needs to know of them, as JSON has it.

    Raises:
        OSError: the disk refused.
    """
    digest = _Digest()
    with ExitStack() as stack:
        files = [
            stack.enter_context(_GrowingArray(folder / f"{name}.npy", dtype if name == "ids" else np.int64))
            for name in _ARRAYS
        ]
        for arrays in _joined(parts, digest):
            for file, array in zip(files, arrays, strict=True):
                file.append(array)
    return {"mark": digest.mark(), "arrays": {file.path.stem: [file.dtype.str, file.length] for file in files}}


def open_store(folder: Path, name: str, written: dict[str, Any]) -> Store:
    """Maps what `write_store` has written.

    Raises:
        OSError, ValueError, KeyError, TypeError: the files are not what `written` says.
    """

    def mapped(array_name: str) -> np.ndarray:
        array = np.lib.format.open_memmap(folder / f"{array_name}.npy", mode="r")
        if [array.dtype.str, *array.shape] != written["arrays"][array_name]:
            raise ValueError(f"{array_name} is another array")
        return array

    return Store(name, mapped("ids"), mapped("offsets"), mapped("edges"), written["mark"])


def _joined(parts: Iterable[Tokens], digest: _Digest) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """What is to be appended to the three arrays for each part, after the first offset."""
    total = 0
    yield np.empty(0, np.uint16), np.zeros(1, np.int64), np.empty(0, np.int64)
    for ids, lengths, edges in parts:
        arrays = ids, total + np.cumsum(lengths), total + edges
        digest.update(ids, arrays[2])
        total += len(ids)
        yield arrays


class _Digest:
    """The mark of a store whose parts come one after the other; where they were divided makes no difference."""

    def __init__(self) -> None:
        self._ids, self._edges = xxh3_128(), xxh3_128()

    def update(self, ids: np.ndarray, edges: np.ndarray) -> None:
        self._ids.update(np.ascontiguousarray(ids).data)
        self._edges.update(np.ascontiguousarray(edges).data)

    def mark(self) -> str:
        return xxh3_128(self._ids.digest() + self._edges.digest()).hexdigest()


class _GrowingArray:
    """A .npy file of one dimension whose length is known at the end."""

    def __init__(self, path: Path, dtype: np.dtype | type) -> None:
        self.path, self.dtype, self.length = path, np.dtype(dtype), 0

    def __enter__(self) -> _GrowingArray:
        self._file = self.path.open("wb")
        self._write_header()
        return self

    def append(self, array: np.ndarray) -> None:
        self._file.write(array.astype(self.dtype, copy=False).data)
        self.length += len(array)

    def __exit__(self, failed: type[BaseException] | None, *_: object) -> None:
        with self._file:
            if failed is None:
                begin = self._file.tell() - self.length * self.dtype.itemsize
                self._file.seek(0)
                self._write_header()
                assert self._file.tell() == begin  # NumPy leaves room in a header for the length to grow

    def _write_header(self) -> None:
        header = {"descr": self.dtype.str, "fortran_order": False, "shape": (self.length,)}
        np.lib.format.write_array_header_1_0(self._file, header)
