"""Data files of every format, damaged in every way that was thought of: each is read, or ends with one message that
names it. Time and memory are bounded."""

from __future__ import annotations

import csv
import functools
import gzip
import io
import json
import random
from collections.abc import Callable
from pathlib import Path

import pyarrow.ipc
import pytest
import zstandard
from pyarrow import parquet

from rwkv_miss import cli
from tests.fuzz.kit import answer

ROWS = [{"question": f'{n} + "{n}"?\n', "answer": f"{2 * n}, 好 é " * n, "id": str(n)} for n in range(1, 21)]


def _jsonl(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def _table(rows: list[dict], delimiter: str = ",") -> bytes:
    writer = csv.DictWriter(text := io.StringIO(), [*rows[0]], delimiter=delimiter, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def _parquet(rows: list[dict]) -> bytes:
    parquet.write_table(pyarrow.Table.from_pylist(rows), file := io.BytesIO(), row_group_size=8)
    return file.getvalue()


def _arrow(rows: list[dict]) -> bytes:
    table = pyarrow.Table.from_pylist(rows)
    with pyarrow.ipc.new_stream(file := io.BytesIO(), table.schema) as writer:
        writer.write_table(table, max_chunksize=8)
    return file.getvalue()


TEXT: dict[str, Callable[[list[dict]], bytes]] = {
    ".jsonl": _jsonl,
    ".json": lambda rows: json.dumps(rows, ensure_ascii=False, indent=1).encode(),
    ".csv": _table,
    ".tsv": lambda rows: _table(rows, "\t"),
    ".txt": lambda rows: "\n\n".join(row["answer"] for row in rows).encode(),
}
PACKERS: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".zst": zstandard.compress}
FORMATS = TEXT | {".parquet": _parquet, ".arrow": _arrow}
SUFFIXES = [*FORMATS, ".jsonl.gz", ".txt.gz", ".json.zst", ".csv.zst"]


@functools.cache
def whole(suffix: str) -> bytes:
    """The bytes of a whole file; of a compressed one what it unpacks to."""
    return FORMATS[f".{suffix.split('.')[1]}"](ROWS)


def packed(suffix: str, content: bytes) -> bytes:
    return PACKERS.get(Path(f"a{suffix}").suffix, bytes)(content)


def _somewhere(rng: random.Random, data: bytes) -> int:
    """A place, more often near the ends, where formats keep what they are."""
    n = len(data)
    return rng.choice([rng.randrange(n), min(n - 1, rng.randrange(64)), max(0, n - 1 - rng.randrange(200))])


def _flip(rng: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 3, 30])):
        changed[_somewhere(rng, data)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _put(rng: random.Random, data: bytes) -> bytes:
    """A run of bytes that is put in the place of others, or between them."""
    some = rng.choice([rng.randbytes(8), bytes(8), b"\xff" * 8, b"\0", b'"', b"\n", b"\r", b"{", b"[", b"]", b",", b"\\"])
    at = _somewhere(rng, data)
    return data[:at] + some + data[at + rng.choice([0, len(some)]) :]


def _cut(rng: random.Random, data: bytes) -> bytes:
    at, end = sorted((_somewhere(rng, data), _somewhere(rng, data)))
    return rng.choice([data[:at], data[at:], data[:at] + data[end:], data[:end] + data[at:]])


DAMAGE = [_flip, _put, _cut]


@pytest.fixture
def read(tmp_path, monkeypatch) -> Callable[[str, bytes], tuple[int, str]]:
    """`read(suffix, content)`: the status and the message of the command that writes a file's records as a binidx."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "_parser", functools.cache(cli._parser))

    def run(suffix: str, content: bytes) -> tuple[int, str]:
        for old in tmp_path.iterdir():
            old.unlink()
        Path(f"a{suffix}").write_bytes(content)
        status, said = answer(["data", "binidx", f"--data=a{suffix}", "--tokenizer=bytes", "--out=b"])
        assert status == (2 if said else 0) and (not said or f"a{suffix}" in said), said
        return status, said

    return run


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_damaged_file(read, suffix):
    """30 of each format."""
    data = packed(suffix, whole(suffix))
    for seed in range(30):
        rng = random.Random(f"{suffix} {seed}")
        damage = DAMAGE[seed % len(DAMAGE)]
        if Path(f"a{suffix}").suffix in PACKERS and seed % 2:
            content = packed(suffix, damage(rng, whole(suffix)))
        else:
            content = damage(rng, data)
        read(suffix, content)
