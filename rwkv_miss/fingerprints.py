"""What identifies a base: a hash of its tensors, whatever the file's format and the order of its keys."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from rwkv_miss.files import cache_folder, replacing
from rwkv_miss.plain_reads import Reader, plain_reads

# Bytes that are hashed at a time.
_PIECE = 2**20
# Bytes of a file whose hash is worth keeping.
_LARGE = 2**26


def fingerprint(tensors: Mapping[str, Tensor], path: str | os.PathLike | None = None) -> str:
    """Two SHA-256 hashes in hex, one behind the other: of every key, shape and dtype and every byte of the tensors, and
    of the same with but 16 evenly spaced pieces of 1 KiB of each tensor. Version 0.1.0 records the second alone.

    Args:
        path: the file that the tensors were read from. The hash of a file is kept in the cache folder, for as long as
            the file's size, time and sampled pieces stay what they were.
    """
    with plain_reads(tensors.values()) as reader:
        sampled = _sampled(tensors, reader)
        if path is None or (stat := os.stat(path)).st_size < _LARGE:
            return _whole(tensors, reader) + sampled
        facts = f"{Path(path).resolve()} {stat.st_ino} {stat.st_size} {stat.st_mtime_ns} {sampled}"
        kept = cache_folder() / "fingerprints" / hashlib.sha256(facts.encode()).hexdigest()
        if kept.is_file():
            return kept.read_text()
        mark = _whole(tensors, reader) + sampled
    with suppress(OSError):  # a cache folder that cannot be written to: it is computed again the next time
        kept.parent.mkdir(parents=True, exist_ok=True)
        with replacing(kept) as part:
            part.write_text(mark)
    return mark


def is_of_base(recorded: str, mark: str) -> bool:
    """Whether the recorded fingerprint, of whatever version, is that of the base whose fingerprint is `mark`."""
    return recorded in (mark, mark[-64:])


def _whole(tensors: Mapping[str, Tensor], reader: Reader) -> str:
    names = sorted(tensors)
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        digests = threads.map(lambda name: _digest(tensors[name], reader), names)
        lines = (_line(name, tensors[name]) + digest for name, digest in zip(names, digests, strict=True))
        return hashlib.sha256(b"".join(lines)).hexdigest()


def _digest(tensor: Tensor, reader: Reader) -> bytes:
    digest = hashlib.sha256()
    for piece in _bytes(tensor).split(_PIECE):
        digest.update(reader.read(piece).numpy().data)
    return digest.digest()


def _sampled(tensors: Mapping[str, Tensor], reader: Reader) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(_line(name, tensors[name]))
        data = _bytes(tensors[name])
        piece, pieces = 1024, 16
        if data.numel() <= piece * pieces:
            digest.update(reader.read(data).numpy().data)
            continue
        step = (data.numel() - piece) // (pieces - 1)
        for i in range(pieces):
            digest.update(reader.read(data[i * step : i * step + piece]).numpy().data)
    return digest.hexdigest()


def _line(name: str, tensor: Tensor) -> bytes:
    return f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode()


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)
