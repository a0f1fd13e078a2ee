"""Data files of every format, damaged in every way that was thought of: each is read, or ends with one message that
names it. Time and memory are bounded."""

from __future__ import annotations

import csv
import functools
import gzip
import io
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow.ipc
import pytest
import zstandard
from pyarrow import parquet

from rwkv_miss import cli
from rwkv_miss.config import DataOptions
from rwkv_miss.data.readers.reader import read_records
from tests.fuzz.kit import answer
from tests.processes import run_process

pytestmark = pytest.mark.slow

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
    some = rng.choice(
        [rng.randbytes(8), bytes(8), b"\xff" * 8, b"\0", b'"', b"\n", b"\r", b"{", b"[", b"]", b",", b"\\"]
    )
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
        status, said = answer(["data", "binidx", f"--data=a{suffix}", "--tokenizer=bytes", "--out=b"], seconds=60)
        assert status == (2 if said else 0) and (not said or f"a{suffix}" in said), said
        return status, said

    return run


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_damaged_bytes(read, suffix):
    """24 of each format; of compressed files half are damaged before they are packed."""
    for seed in range(24):
        rng = random.Random(f"{suffix} {seed}")
        damage = DAMAGE[seed % len(DAMAGE)]
        inside = seed % 2 == 1
        content = packed(suffix, damage(rng, whole(suffix))) if inside else damage(rng, packed(suffix, whole(suffix)))
        read(suffix, content)


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl.gz", ".txt.gz", ".json.zst", ".csv.zst", ".json"])
def test_a_file_that_is_cut_off_is_never_read(read, suffix):
    data = packed(suffix, whole(suffix)).strip()
    for end in [*range(0, len(data), len(data) // 8 + 1), len(data) - 1]:
        assert read(suffix, data[:end])[0] == 2, end


def test_a_saved_data_set_of_which_a_file_is_cut_off(read):
    data = whole(".arrow")
    said = [read(".arrow", data[:end])[1] for end in range(100, len(data) - 200, len(data) // 8)]
    assert sum("cannot be read from row" in message for message in said) >= len(said) - 1  # one may be between batches


SAME: dict[str, Callable[[bytes], bytes]] = {
    "a byte order mark": lambda data: b"\xef\xbb\xbf" + data,
    "CRLF": lambda data: data.replace(b"\n", b"\r\n"),
    "space at the end": lambda data: data + b"\n\n",
}
ENCODINGS = ["utf-16", "utf-32", "gbk", "latin-1"]


@pytest.mark.parametrize("suffix", TEXT)
def test_text_in_other_forms(read, suffix):
    """What means the same is read as the same; other encodings are refused with what to do."""
    rows = [{"question": f"{n} + é?", "answer": f"{n} é"} for n in range(9)]
    data = TEXT[suffix](rows)
    read(suffix, data)
    ids = Path("b.bin").read_bytes()
    for change in SAME.values():
        status, _ = read(suffix, change(data))
        assert status == 0 and (Path("b.bin").read_bytes() == ids or suffix == ".txt")
    for encoding in ENCODINGS:
        status, said = read(suffix, data.decode().encode(encoding))
        assert status == 2 and ("UTF-8" if encoding in ("gbk", "latin-1") else "iconv") in said, (encoding, said)
    status, said = read(suffix, data.decode().replace("é", "e").encode("utf-16-le"))
    assert status == 2 and ("holds a NUL" in said or suffix == ".jsonl")


VALUES = {
    "a long number": b"9" * 5000,
    "nested": b"[" * 10_000 + b"]" * 10_000,
    "nested objects": b'{"a":' * 10_000 + b"1" + b"}" * 10_000,
    "NUL": b'"\\u0000"',
    "half a pair": b'"\\ud800"',
}


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("form", ['{"text": %s}', '{"text": "a", "more": %s}'])
@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_values_in_json(read, suffix, form, value):
    item = form.encode() % VALUES[value]
    good = b'{"text": "a"}'
    status, said = read(suffix, b"\n".join([good, item, good]) if suffix == ".jsonl" else b"[%s,%s]" % (good, item))
    assert f"a{suffix}:2: " in said or (status == 0 and value in ("NUL", "half a pair"))


@pytest.mark.parametrize("suffix", [*FORMATS, ".jsonl.gz"])
def test_a_record_of_10_mb_is_read(tmp_path, suffix):
    text = "word " * (2 << 20)
    rows = [{"text": "one", "answer": "one"}, {"text": text, "answer": text}]
    path = tmp_path / f"a{suffix}"
    path.write_bytes(packed(suffix, FORMATS[f".{suffix.split('.')[1]}"](rows)))
    *_, record = read_records(path, DataOptions(separator="\n\n" if suffix == ".txt" else None))
    [turn] = record.turns
    assert text == turn[1]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_content_of_another_format(read, suffix):
    for other in (b"", b" \n", b"\0" * 100, *(packed(name, whole(name)) for name in SUFFIXES if name != suffix)):
        read(suffix, other)


MB = 1 << 20
BOMBS: dict[str, tuple[bytes, bytes, str]] = {  # how the text begins, what then comes again and again, and what is said
    "a.jsonl": (b'{"text": "a"}\n', b"a", ":2: is longer than 33,554,432 bytes"),
    "a.json": (b'[{"text": "', b"a", ":1: is longer than 33,554,432 characters"),
    "b.json": (b"[", b" ", "unpacks to more than 200 times its size"),
    "a.csv": (b'text\n"', b"a", ":2: is longer than 33,554,432 bytes; no record may be. Is a quotation mark missing?"),
    "a.txt": (b"", b"a ", "unpacks to more than 200 times its size"),
    "b.txt": (b"", b"\0", "line 1 holds a NUL"),
    "b.jsonl": (b"", b'{"text": "%s"}\n' % (b"a" * 9985), "unpacks to more than 200 times its size"),
}


@pytest.mark.slow
def test_files_that_unpack_to_gigabytes(tmp_path):
    """Each is refused, and reading them takes no more than 500 MB."""
    for name, (begin, again, _) in BOMBS.items():
        packer = zstandard.ZstdCompressor().compressobj()
        piece = again * (MB // len(again))
        content = packer.compress(begin) + b"".join(packer.compress(piece) for _ in range(1000)) + packer.flush()
        (tmp_path / f"{name}.zst").write_bytes(content)
    column = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 2000, pyarrow.int32()), ["x" * MB])
    parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    code = """
import re, sys
from rwkv_miss.config import DataOptions
from rwkv_miss.data.readers.reader import read_records
for path in sys.argv[1:]:
    try:
        print(sum(1 for record in read_records(path, DataOptions())))
    except ValueError as error:
        print(error)
print(int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) // 1024)
"""
    names = [*(f"{name}.zst" for name in BOMBS), "a.parquet"]
    result = run_process([sys.executable, "-c", code, *names], cwd=tmp_path, timeout=120)
    *messages, megabytes = result.stdout.splitlines()
    assert len(messages) == len(names), result.stderr
    for name, message in zip(names, messages, strict=True):
        said = BOMBS[name.removesuffix(".zst")][2] if name in names[:-1] else "unpacks to more than 200 times"
        assert message.startswith(name) and said in message
    assert int(megabytes) < 500
