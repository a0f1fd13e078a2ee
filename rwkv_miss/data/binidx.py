"""binidx: a corpus of token ids as Megatron-LM keeps it, a pair of files that is read without being loaded.

PREFIX.bin holds every token, one document after the other. PREFIX.idx (Megatron-LM, core/datasets/indexed_dataset.py;
all little-endian): the magic `MMIDIDX\\0\\0`, uint64 version 1, uint8 dtype code, uint64 number of sequences n, uint64
number of document boundaries m; then int32 sizes (n), in tokens; int64 pointers (n), in bytes from the start of
PREFIX.bin; int64 document index (m): document i is the sequences from entry i up to entry i + 1.
"""

from __future__ import annotations

import os.path
import struct
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from rwkv_miss.errors import UserError
from rwkv_miss.files import atomic_write, check_name

_MAGIC = b"MMIDIDX\0\0"
_HEADER = struct.Struct("<9sQBQQ")
_LONGEST = np.iinfo(np.int32).max
# Codes 6 and 7 are floating-point numbers, which no tokens are.
_DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}


@dataclass(frozen=True, slots=True, eq=False)
class BinIdx:
    """An open pair: document i is tokens[offsets[i]:offsets[i + 1]].

    tokens (N,) in the file's dtype, memory-mapped and read-only; offsets int64 (documents + 1,).
    """

    prefix: str
    tokens: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        """The number of documents."""
        return len(self.offsets) - 1

    def document_at(self, position: int) -> int:
        """The document that tokens[position] belongs to."""
        return int(np.searchsorted(self.offsets, position, side="right")) - 1


def binidx_prefix(path: str | Path) -> str | None:
    """The PREFIX of the binidx that `path` means, or None if it means something else.

    PREFIX.bin and PREFIX.idx mean a binidx, whether they exist or not. PREFIX alone means one if either file exists; if
    PREFIX is itself a file, that file is meant. If PREFIX is a folder, PREFIX.bin and PREFIX.idx are used.
    """
    name = str(path)
    if name.endswith((".bin", ".idx")):
        return name[:-4]
    if not os.path.isfile(name) and (os.path.isfile(f"{name}.idx") or os.path.isfile(f"{name}.bin")):
        return name
    return None


def read_binidx(prefix: str | Path) -> BinIdx:
    """Opens PREFIX.bin and PREFIX.idx. The whole index is read and checked; no token is.

    Raises:
        UserError: a file is missing, truncated, longer than it says or of another format, or the two do not belong
            together.
    """
    prefix = str(prefix)
    idx, data = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    for path in (idx, data):
        check_name(path, "a binidx")
        if not path.is_file():
            raise UserError(f"{path}: no such file; a binidx needs both {idx.name} and {data.name}")
    try:
        dtype, sizes, pointers, boundaries = _read_index(idx)
        n_bytes = data.stat().st_size
        ends = np.cumsum(sizes, dtype=np.int64)
        if (wrong := _first(pointers != (ends - sizes) * dtype.itemsize)) is not None:
            raise UserError(
                f"{idx}: sequence {wrong} begins at byte {pointers[wrong]}, the sizes before it make it "
                f"{(ends - sizes)[wrong] * dtype.itemsize}; the file is corrupt"
            )
        total = int(ends[-1]) if len(ends) else 0
        if total * dtype.itemsize != n_bytes:
            raise UserError(
                f"{data}: has {n_bytes:,} bytes, its index says {total * dtype.itemsize:,} ({total:,} tokens of "
                f"{dtype.name}); it is truncated, or belongs to another index"
            )
        if not total:
            raise UserError(f"{data}: there is no token in it")
        tokens = np.asarray(np.memmap(data, dtype=dtype, mode="r"))
    except OSError as error:
        raise UserError(f"{error.filename or prefix}: cannot be read: {error.strerror}") from error
    return BinIdx(prefix, tokens, np.concatenate([[0], ends])[boundaries])


def _read_index(path: Path) -> tuple[np.dtype, np.ndarray, np.ndarray, np.ndarray]:
    """The dtype, sizes, pointers and document index of an index file, checked as far as it can be without the tokens.
    Raises UserError for what is wrong."""

    def refuse(what: str) -> UserError:
        return UserError(f"{path}: {what}")

    with path.open("rb") as file:
        header = file.read(_HEADER.size)
    if not header.startswith(_MAGIC):
        raise refuse(f"begins with {header[:9]!r}, not with {_MAGIC!r}; it is not the index of a binidx")
    if len(header) < _HEADER.size:
        raise refuse(f"has {len(header)} bytes, too few for the header; it is truncated")
    _, version, code, n, m = _HEADER.unpack(header)
    if version != 1:
        raise refuse(f"is of version {version}; 1 can be read")
    if code not in _DTYPES:
        kind = "floating-point numbers, not token ids" if code in (6, 7) else "no dtype that Megatron has"
        raise refuse(f"its dtype code is {code}: {kind}")
    n_bytes, needed = path.stat().st_size, _HEADER.size + (4 + 8) * n + 8 * m
    if n_bytes == needed + n and n:
        raise refuse("holds a mode for each sequence (a multimodal corpus); only text can be read")
    if n_bytes != needed:
        raise refuse(
            f"has {n_bytes:,} bytes, {n:,} sequences and {m:,} document boundaries take {needed:,}; it is "
            f"{'truncated' if n_bytes < needed else 'corrupt'}"
        )
    mapped = np.memmap(path, dtype=np.uint8, mode="r", offset=0)
    at_pointers, at_boundaries = _HEADER.size + 4 * n, _HEADER.size + 12 * n
    sizes = np.frombuffer(mapped, "<i4", n, _HEADER.size)
    pointers = np.frombuffer(mapped, "<i8", n, at_pointers)
    boundaries = np.frombuffer(mapped, "<i8", m, at_boundaries)
    if (wrong := _first(sizes < 0)) is not None:
        raise refuse(f"sequence {wrong} has size {sizes[wrong]}; the file is corrupt")
    if m < 2:
        raise refuse("lists no document")
    if boundaries[0] != 0 or boundaries[-1] != n:
        raise refuse(f"its documents span sequences {boundaries[0]} to {boundaries[-1]}, not 0 to {n}; it is corrupt")
    if (wrong := _first(boundaries[1:] < boundaries[:-1])) is not None:
        raise refuse(f"document {wrong} ends before it begins; the file is corrupt")
    return np.dtype(_DTYPES[code]), sizes, pointers, boundaries


def write_binidx(prefix: str | Path, documents: Iterable[ArrayLike], dtype: np.dtype | type = np.uint16) -> int:
    """Writes PREFIX.bin and PREFIX.idx, one document at a time, each as one sequence.

    Both files are written under other names and then renamed, the index last, so that a pair with an index is whole.

    Args:
        documents: the ids of each document, (L,). An empty document, or none at all, is no error.
        dtype: the dtype of the ids in the file, one that `_DTYPES` has a code for. RWKV programs read uint16.

    Returns:
        The number of tokens.

    Raises:
        UserError: the dtype cannot hold an id, or the files cannot be written. Nothing is left of them then.
    """
    ordered: np.dtype = np.dtype(dtype).newbyteorder("<")
    code = next(code for code, name in _DTYPES.items() if np.dtype(name) == ordered)
    limits = np.iinfo(ordered)
    sizes = array("i")
    # The inner context ends first, so PREFIX.bin is renamed first.
    with atomic_write(f"{prefix}.idx") as idx, atomic_write(f"{prefix}.bin") as data:
        with data.open("wb") as file:
            for number, document in enumerate(documents):
                ids = np.asarray(document)
                if len(ids) > _LONGEST:
                    raise UserError(f"{prefix}.bin: document {number} has {len(ids):,} tokens, more than {_LONGEST:,}")
                if (wrong := _first((ids < limits.min) | (ids > limits.max))) is not None:
                    raise UserError(
                        f"{prefix}.bin: document {number}: token {ids[wrong]} does not fit into {ordered.name} "
                        f"({limits.min} to {limits.max})"
                    )
                file.write(ids.astype(ordered).tobytes())
                sizes.append(len(ids))
        lengths = np.array(sizes, dtype="<i4")
        ends = np.cumsum(lengths, dtype="<i8")
        with idx.open("wb") as file:
            file.write(_HEADER.pack(_MAGIC, 1, code, len(lengths), len(lengths) + 1))
            file.write(lengths.tobytes())
            file.write(((ends - lengths) * ordered.itemsize).tobytes())
            file.write(np.arange(len(lengths) + 1, dtype="<i8").tobytes())
    return int(ends[-1]) if len(ends) else 0


def _first(wrong: np.ndarray) -> int | None:
    """The first index at which `wrong` is true; None if there is none."""
    return int(np.argmax(wrong)) if wrong.any() else None
