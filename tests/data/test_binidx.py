"""The binidx format (Megatron's .bin and .idx): we read and write the bytes that it prescribes, and refuse all else."""

from __future__ import annotations

import json
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rwkv_miss.config import DataOptions
from rwkv_miss.data.binidx import binidx_prefix, read_binidx, write_binidx
from rwkv_miss.data.corpus import records_to_binidx
from rwkv_miss.data.readers import jsonl
from rwkv_miss.data.tokenizers import load_tokenizer
from rwkv_miss.errors import UserError

# Megatron-LM's enumeration of dtypes: code, struct's letter, NumPy's name.
DTYPES = [
    (1, "B", "uint8"),
    (2, "b", "int8"),
    (3, "h", "int16"),
    (4, "i", "int32"),
    (5, "q", "int64"),
    (8, "H", "uint16"),
]
DOCUMENTS = [[1, 2, 3, 0], [70, 0], [], [5]]


def by_hand(prefix: Path, documents: list[list[int]], code: int = 8, letter: str = "H", **changes) -> None:
    """Writes a .bin and .idx with one sequence for each document. `changes` replace fields of the index."""
    sizes = [len(d) for d in documents]
    width = struct.calcsize(letter)
    fields = {
        "magic": b"MMIDIDX\x00\x00",
        "version": 1,
        "code": code,
        "n": len(sizes),
        "m": len(sizes) + 1,
        "sizes": sizes,
        "pointers": [sum(sizes[:i]) * width for i in range(len(sizes))],
        "boundaries": list(range(len(sizes) + 1)),
        "modes": [],
    } | changes
    index = fields["magic"] + struct.pack("<QBQQ", *(fields[k] for k in ("version", "code", "n", "m")))
    for name, kind in (("sizes", "i"), ("pointers", "q"), ("boundaries", "q"), ("modes", "b")):
        index += struct.pack(f"<{len(fields[name])}{kind}", *fields[name])
    Path(f"{prefix}.idx").write_bytes(index)
    ids = [i for d in documents for i in d]
    Path(f"{prefix}.bin").write_bytes(struct.pack(f"<{len(ids)}{letter}", *ids))


def documents_of(prefix: Path) -> list[list[int]]:
    pair = read_binidx(prefix)
    return [pair.tokens[a:b].tolist() for a, b in zip(pair.offsets[:-1], pair.offsets[1:], strict=True)]


@pytest.mark.parametrize(("code", "letter", "name"), DTYPES)
def test_the_bytes_are_those_of_the_format(tmp_path, code, letter, name):
    by_hand(tmp_path / "hand", DOCUMENTS, code, letter)
    assert documents_of(tmp_path / "hand") == DOCUMENTS
    assert read_binidx(tmp_path / "hand").tokens.dtype == name
    assert write_binidx(tmp_path / "ours", DOCUMENTS, np.dtype(name)) == 7
    for suffix in ("idx", "bin"):
        assert (tmp_path / f"ours.{suffix}").read_bytes() == (tmp_path / f"hand.{suffix}").read_bytes()
    assert {p.name for p in tmp_path.iterdir()} == {"hand.bin", "hand.idx", "ours.bin", "ours.idx"}


@pytest.mark.parametrize("name", ["uint8", "int32", "int64"])
def test_deepspeed_s_copy_of_megatron_s_code(tmp_path, name):
    """DeepSpeed writes the bytes that we write, and reads ours. (Megatron does not know its dtype code for uint16.)"""
    theirs = pytest.importorskip("deepspeed.runtime.data_pipeline.data_sampling.indexed_dataset")
    dtype = np.dtype(name)
    builder = theirs.MMapIndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype.type)
    for document in DOCUMENTS:
        builder.add_item_numpy(np.array(document, dtype))
        builder.end_document()
    builder.finalize(str(tmp_path / "theirs.idx"))
    write_binidx(tmp_path / "ours", DOCUMENTS, dtype)
    for suffix in ("idx", "bin"):
        assert (tmp_path / f"ours.{suffix}").read_bytes() == (tmp_path / f"theirs.{suffix}").read_bytes()
    read = theirs.MMapIndexedDataset(str(tmp_path / "ours"), skip_warmup=True)
    assert [read[i].tolist() for i in range(len(read))] == DOCUMENTS


@given(st.lists(st.lists(st.integers(0, 65535), max_size=9), min_size=1, max_size=20).filter(any))
def test_what_was_written_is_read(tmp_path_factory, documents):
    prefix = tmp_path_factory.mktemp("pair") / "p"
    write_binidx(prefix, (np.array(d, np.int32) for d in documents))
    assert documents_of(prefix) == documents


def test_a_document_of_several_sequences_is_one(tmp_path):
    by_hand(tmp_path / "p", [[1, 2], [3], [4, 5, 6], [0]], m=4, boundaries=[0, 2, 2, 4])
    assert documents_of(tmp_path / "p") == [[1, 2, 3], [], [4, 5, 6, 0]]
    pair = read_binidx(tmp_path / "p")
    assert [pair.document_at(i) for i in range(7)] == [0, 0, 0, 2, 2, 2, 2]


def test_the_tokens_are_mapped_and_cannot_be_changed(tmp_path):
    by_hand(tmp_path / "p", DOCUMENTS)
    tokens = read_binidx(tmp_path / "p").tokens
    assert isinstance(tokens.base, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        tokens[0] = 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"magic": b"TNTIDX\x00\x00\x00"}, r"p\.idx: begins with b'TNTIDX.* not the index of a binidx"),
        ({"version": 2}, r"p\.idx: is of version 2"),
        ({"code": 7}, r"p\.idx: its dtype code is 7: floating-point numbers"),
        ({"code": 6}, r"p\.idx: its dtype code is 6: floating-point numbers"),
        ({"code": 9}, r"p\.idx: its dtype code is 9: no dtype"),
        ({"code": 0}, r"p\.idx: its dtype code is 0: no dtype"),
        ({"n": 5}, r"p\.idx: has 122 bytes, 5 sequences and 5 document boundaries take 134; it is truncated"),
        ({"n": 2**62}, r"p\.idx: has 122 bytes, .* truncated"),
        ({"n": 3}, r"p\.idx: has 122 bytes, .* take 110; it is corrupt"),
        ({"m": 4}, r"p\.idx: has 122 bytes, .* take 114"),
        ({"m": 6}, r"p\.idx: has 122 bytes, .* take 130; it is truncated"),
        ({"modes": [0] * 4}, r"p\.idx: holds a mode for each sequence"),
        ({"sizes": [4, 2, -1, 2]}, r"p\.idx: sequence 2 has size -1"),
        ({"sizes": [4, 1, 1, 1]}, r"p\.idx: sequence 2 begins at byte 12, the sizes before it make it 10"),
        ({"sizes": [4, 2, 0, 2]}, r"p\.bin: has 14 bytes, its index says 16 \(8 tokens of uint16\)"),
        ({"pointers": [0, 8, 12, 10]}, r"p\.idx: sequence 3 begins at byte 10, the sizes before it make it 12"),
        ({"pointers": [2, 10, 14, 14]}, r"p\.idx: sequence 0 begins at byte 2, .* make it 0"),
        ({"boundaries": [1, 1, 2, 3, 4]}, r"p\.idx: its documents span sequences 1 to 4, not 0 to 4"),
        ({"boundaries": [0, 1, 2, 3, 3]}, r"p\.idx: its documents span sequences 0 to 3, not 0 to 4"),
        ({"boundaries": [0, 3, 2, 3, 4]}, r"p\.idx: document 1 ends before it begins"),
        ({"m": 0, "boundaries": []}, r"p\.idx: lists no document"),
    ],
)
def test_a_corrupt_index_is_refused(tmp_path, changes, message):
    by_hand(tmp_path / "p", DOCUMENTS, **{"code": 8} | changes)
    with pytest.raises(UserError, match=message):
        read_binidx(tmp_path / "p")


@pytest.mark.parametrize("suffix", ["idx", "bin"])
def test_a_truncated_or_grown_file_is_refused(tmp_path, suffix):
    by_hand(tmp_path / "p", DOCUMENTS)
    path = tmp_path / f"p.{suffix}"
    whole = path.read_bytes()
    for content in [whole[:n] for n in range(len(whole))] + [whole + b"\0", whole + whole]:
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf"p\.{suffix}: "):
            read_binidx(tmp_path / "p")


@pytest.mark.parametrize("suffix", ["idx", "bin"])
def test_a_missing_half(tmp_path, suffix):
    by_hand(tmp_path / "p", DOCUMENTS)
    (tmp_path / f"p.{suffix}").unlink()
    with pytest.raises(UserError, match=rf"p\.{suffix}: no such file; a binidx needs both p\.idx and p\.bin"):
        read_binidx(tmp_path / "p")


def test_no_tokens(tmp_path):
    write_binidx(tmp_path / "p", [[], []])
    with pytest.raises(UserError, match=r"p\.bin: there is no token in it"):
        read_binidx(tmp_path / "p")
    write_binidx(tmp_path / "q", [])
    with pytest.raises(UserError, match=r"q\.idx: lists no document"):
        read_binidx(tmp_path / "q")


@pytest.mark.parametrize("bad", [65536, -1])
def test_an_id_that_the_dtype_does_not_hold(tmp_path, bad):
    with pytest.raises(UserError, match=rf"p\.bin: document 1: token {bad} does not fit into uint16 \(0 to 65535\)"):
        write_binidx(tmp_path / "p", [[1, 2], [3, bad]])
    assert not list(tmp_path.iterdir())
    assert write_binidx(tmp_path / "p", [[1, 2], [3, bad]], np.int32) == 4
    assert documents_of(tmp_path / "p") == [[1, 2], [3, bad]]


def test_a_document_of_too_many_tokens(tmp_path):
    with pytest.raises(UserError, match=r"document 0 has 2,147,483,648 tokens, more than 2,147,483,647"):
        write_binidx(tmp_path / "p", [np.broadcast_to(np.uint16(1), 2**31)])
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_what_was_there(tmp_path, full_disk):
    write_binidx(tmp_path / "p", DOCUMENTS)
    with full_disk(1000), pytest.raises(UserError, match=r"p\.bin: cannot be written: .*unchanged"):
        write_binidx(tmp_path / "p", [[1] * 10_000])
    assert documents_of(tmp_path / "p") == DOCUMENTS and len(list(tmp_path.iterdir())) == 2


def test_records_are_written_block_by_block(tmp_path, monkeypatch):
    """Ten times as many records take no more memory: only the length of each is kept, and a block of lines."""
    monkeypatch.setattr(jsonl, "BLOCK_SIZE", 10_000)
    peaks = []
    for count in (50, 500):
        path = tmp_path / f"{count}.jsonl"
        path.write_text("".join(json.dumps({"text": f"{n}" + "tick " * 1000}) + "\n" for n in range(count)))
        tracemalloc.start()
        records_to_binidx(str(path), str(tmp_path / f"{count}"), load_tokenizer("bytes"), DataOptions())
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert len(read_binidx(tmp_path / "500").tokens) > 500 * 5000
    assert peaks[1] < 1.2 * peaks[0] < 1e6


def test_what_a_path_means(tmp_path):
    by_hand(tmp_path / "my.corpus", DOCUMENTS)
    prefix = str(tmp_path / "my.corpus")
    assert [binidx_prefix(p) for p in (prefix, f"{prefix}.bin", Path(f"{prefix}.idx"))] == [prefix] * 3
    assert binidx_prefix(tmp_path / "my") is None
    (tmp_path / "my.corpus.bin").unlink()
    assert binidx_prefix(prefix) == prefix  # so that reading it reports the missing .bin
    (tmp_path / "my.corpus").mkdir()
    assert binidx_prefix(prefix) == prefix
    (tmp_path / "my.corpus").rmdir()
    (tmp_path / "my.corpus").write_text("")
    assert binidx_prefix(prefix) is None
