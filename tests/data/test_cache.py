"""Tokens from the cache are those that were read, are read once, and are never those of other data or corpus."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from dataclasses import asdict, astuple, fields, replace
from pathlib import Path

import numpy as np
import pytest

from rwkv_miss.config import DataOptions
from rwkv_miss.data import cache
from rwkv_miss.data.binidx import write_binidx
from rwkv_miss.data.cache import cached_store
from rwkv_miss.data.corpus import Corpus, read_tokens
from rwkv_miss.data.documents import all_documents, split_validation
from rwkv_miss.data.packing import make_rows
from rwkv_miss.data.parts import PartSettings, read_parts
from rwkv_miss.data.sources import Source
from rwkv_miss.data.store import store_in_memory
from rwkv_miss.errors import UserError
from rwkv_miss.files import locked
from tests.data.samples import everything
from tests.processes import finish, run_process


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Where the entries are; nothing else is in this cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "rwkv_miss" / "data"


SETTINGS = PartSettings("bytes", 256, ctx_len=64, packing=True, carry=False, group_size=None, val_split=0.0, seed=3)


@pytest.fixture
def corpus(tmp_path) -> Corpus:
    """24 records, of which one has a field that is not read and one an answer that a runtime cuts."""
    records: list[dict] = [{"question": f"q{n}", "answer": "tick " * (n % 7 + 1)} for n in range(24)]
    records[3]["source"] = "web"
    records[5]["answer"] += "\n\nUser: go on"
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return Corpus((str(path),), "bytes", 256, DataOptions())


def entries(folder: Path) -> list[Path]:
    """The entries, and whatever else is there beside the locks."""
    return [path for path in folder.glob("*") if path.suffix != ".lock"]


def read(corpus):
    """The store as it is read, in memory."""
    return store_in_memory(corpus.name, read_tokens(corpus))


def same(store, other) -> bool:
    def equal(a, b):
        return a.dtype == b.dtype and np.array_equal(a, b)

    return (store.name, store.mark, store.vocab_size) == (other.name, other.mark, other.vocab_size) and all(
        equal(getattr(store, name), getattr(other, name)) for name in ("ids", "offsets", "edges")
    )


def refuse(*arguments, **options):
    raise AssertionError("this must not be called")


@pytest.mark.parametrize("tokenizer", ["bytes", "world"])
def test_what_was_read_is_found_again(folder, corpus, monkeypatch, caplog, tokenizer):
    corpus = replace(corpus, tokenizer=tokenizer, vocab_size=65536)
    wanted = read(corpus)
    said = caplog.messages.copy()
    assert len(said) == 2 and "'source' (1)" in said[0] and "answers hold" in said[1]
    caplog.clear()
    made = cached_store(corpus)
    assert same(made, wanted) and caplog.messages == said
    caplog.clear()
    monkeypatch.setattr(cache, "read_tokens", refuse)
    found = cached_store(corpus)
    assert same(found, wanted) and caplog.messages == said
    assert {record.levelname for record in caplog.records} == {"WARNING"}
    for store in (made, found):
        arrays = [store.ids, store.offsets, store.edges]
        assert all(isinstance(array, np.memmap) and not array.flags.writeable for array in arrays)
        assert store.ids.dtype == np.uint16


def test_rows_are_those_of_tokens_in_memory(folder, corpus):
    parts = read_parts([Source("a", (Path(corpus.files[0]),), 1, DataOptions())], replace(SETTINGS, val_split=0.25))
    sides = split_validation([all_documents(read(corpus))], 0.25, 3)
    for (rows, reports), [side], name in zip(parts, sides, ["a", "a, held out"], strict=True):
        wanted, wanted_report = make_rows(side, 64, packing=True)
        assert reports == [(name, wanted_report)] and rows.fingerprint() == wanted.fingerprint()
        assert all(
            np.array_equal(a, b) for a, b in zip(astuple(everything(rows)), astuple(everything(wanted)), strict=True)
        )


def test_a_process_that_shows_no_warnings_keeps_them_for_others(folder, corpus, monkeypatch, caplog):
    with caplog.at_level("ERROR", "rwkv_miss"):
        cached_store(corpus)
        assert not caplog.messages
    cached_store(corpus)
    assert len(caplog.messages) == 2


def changed(value):
    """Another value of the same type."""
    if isinstance(value, tuple):
        return tuple(map(changed, value))
    if value is None or isinstance(value, str):
        return f"{value or ''}x"
    return not value if isinstance(value, bool) else value + 1


@pytest.mark.parametrize("name", [field.name for field in fields(Corpus) if field.name != "options"])
def test_each_setting_has_its_entry(corpus, name):
    shutil.copy(corpus.files[0], f"{corpus.files[0]}x")  # the content is the same, the name another
    assert cache._key(corpus) == cache._key(replace(corpus)) is not None
    assert cache._key(replace(corpus, **{name: changed(getattr(corpus, name))})) not in (None, cache._key(corpus))


@pytest.mark.parametrize("name", [field.name for field in fields(DataOptions)])
def test_each_option_has_its_entry(corpus, name):
    options = replace(corpus.options, **{name: changed(getattr(corpus.options, name))})
    assert cache._key(replace(corpus, options=options)) not in (None, cache._key(corpus))


@pytest.mark.parametrize("of", ["data", "tokenizer", "reader", "package"])
def test_another_content_has_another_entry(corpus, tmp_path, monkeypatch, of):
    shutil.copytree(Path(cache.__file__).parent, tmp_path / "code")
    monkeypatch.setattr(cache, "__file__", str(tmp_path / "code" / "cache.py"))
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text("{}")
    corpus = replace(corpus, tokenizer=str(tokenizer))
    before = cache._key(corpus)
    assert before == cache._key(corpus)
    if of == "package":
        monkeypatch.setattr(cache, "version", lambda package: "0.0" if package == "tokenizers" else "1")
    else:
        files = {"data": corpus.files[0], "tokenizer": tokenizer, "reader": tmp_path / "code" / "readers" / "jsonl.py"}
        with open(files[of], "a") as file:
            file.write("\n")
    assert cache._key(corpus) not in (None, before)


def test_two_processes_read_once(folder, corpus, tmp_path, start_process):
    """Both wait for a third that holds the lock, and say so; then one reads while the other waits."""
    code = f"""
import logging
from rwkv_miss.config import DataOptions
from rwkv_miss.data import cache, corpus
logging.basicConfig(level=logging.INFO, format="%(message)s")
cache._PATIENCE = 0.01
encode = corpus.encode_records
def counted(records, *arguments):
    records = list(records)
    with open({str(tmp_path / "read")!r}, "a") as file:
        file.write("".join(record.where + chr(10) for record in records))
    return encode(records, *arguments)
corpus.encode_records = counted
store = cache.cached_store(corpus.Corpus(**{asdict(corpus) | {"options": None}} | {{"options": DataOptions()}}))
print(store.mark, type(store.ids).__name__)
"""
    key = cache._key(corpus)
    logs = [tmp_path / f"log{i}" for i in range(2)]
    with locked(folder / f"{key[:2]}.lock"):
        started = []
        for log in logs:
            with log.open("w") as file:
                started.append(start_process([sys.executable, "-c", code], stderr=file))
        deadline = time.monotonic() + 60
        while not all("waiting for another process" in log.read_text() for log in logs):
            assert time.monotonic() < deadline and all(process.poll() is None for process in started)
            time.sleep(0.02)
    printed = finish(*started)
    assert printed == [f"{read(corpus).mark} memmap\n"] * 2
    assert len((tmp_path / "read").read_text().splitlines()) == 24
    assert [path.name for path in entries(folder)] == [key]
    assert all(log.read_text().count("'source' (1)") == 1 for log in logs)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGES = {
    "truncated": truncate,
    "empty": lambda path: path.write_bytes(b""),
    "missing": Path.unlink,
    "other bytes": lambda path: path.write_bytes(b"\x80" * path.stat().st_size),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_made_again(folder, corpus, caplog, damage):
    wanted = read(corpus)
    cached_store(corpus)
    [entry] = entries(folder)
    names = sorted(path.name for path in entry.iterdir())
    assert len(names) == 4
    for name in names:
        caplog.clear()
        DAMAGES[damage](entry / name)
        assert same(cached_store(corpus), wanted), name
        assert sum("is damaged" in message for message in caplog.messages) == 1, name
        assert same(cached_store(corpus), wanted) and entries(folder) == [entry]
        assert sum("is damaged" in message for message in caplog.messages) == 1, name


@pytest.mark.parametrize("change", [lambda ids: ids[:-1], lambda ids: ids.astype(np.int64)])
def test_an_array_of_another_shape_or_dtype_is_damage(folder, corpus, change):
    wanted = read(corpus)
    cached_store(corpus)
    [path] = folder.glob("*/ids.npy")
    np.save(path, change(np.load(path)))
    assert same(cached_store(corpus), wanted)


def test_a_cache_that_cannot_be_made_is_a_warning(corpus, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert same(cached_store(corpus), read(corpus))
    assert "tokens cannot be cached (Not a directory); each process keeps its own in memory" in caplog.messages[0]


def test_a_full_disk_is_a_warning_and_leaves_nothing(folder, corpus, full_disk, caplog):
    wanted = read(corpus)
    for size in (0, 200, 1000, 2000):  # in each of the files
        caplog.clear()
        with full_disk(size):
            assert same(cached_store(corpus), wanted)
        assert len([message for message in caplog.messages if "tokens cannot be cached" in message]) == 1
        assert entries(folder) == []


def test_an_entry_in_a_folder_that_cannot_be_written_is_used(folder, corpus, monkeypatch):
    cached_store(corpus)
    monkeypatch.setattr(cache, "read_tokens", refuse)
    monkeypatch.setattr(cache, "locked", refuse)
    monkeypatch.setattr(os, "utime", lambda path: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    cached_store(corpus)


def test_mistakes_are_not_cached(folder, corpus):
    for _ in range(2):
        with pytest.raises(UserError, match=r"token 116 \('t'\) of tokenizer bytes is not in the model's vocabulary"):
            cached_store(replace(corpus, vocab_size=116))
    with pytest.raises(UserError, match=r"none\.jsonl: no such file"):
        cached_store(replace(corpus, files=("none.jsonl",)))
    assert entries(folder) == []


def test_a_file_that_changes_while_it_is_read_is_not_cached(folder, corpus, monkeypatch):
    wanted = read(corpus)

    def read_and_change(corpus):
        yield from read_tokens(corpus)
        with open(corpus.files[0], "a") as file:
            file.write("\n")

    monkeypatch.setattr(cache, "read_tokens", read_and_change)
    assert same(cached_store(corpus), wanted)
    assert entries(folder) == []


def test_what_was_not_used_for_long_is_removed(folder, corpus):
    others = [replace(corpus, vocab_size=vocab_size) for vocab_size in (257, 258)]
    for other in others:
        cached_store(other)
    old, used = (folder / cache._key(other) for other in others)
    half = folder / ".of-a-killed-process.1.part"
    half.mkdir()
    month = time.time() - 31 * 24 * 3600
    for path in (old, used, half):
        os.utime(path, (month, month))
    cached_store(others[1])
    assert {old, used, half} == set(entries(folder))
    cached_store(corpus)
    assert set(entries(folder)) == {used, folder / cache._key(corpus)}


def test_what_a_killed_process_left_is_removed(folder, corpus):
    left = folder / f".{cache._key(corpus)}.1.part"
    left.mkdir(parents=True)
    (left / "ids.npy").write_bytes(b"half")
    cached_store(corpus)
    assert entries(folder) == [folder / cache._key(corpus)]


def test_a_binidx_is_not_cached(folder, corpus, tmp_path):
    write_binidx(tmp_path / "p", [[1, 2, 3], [4, 5]])
    [(rows, _)] = read_parts([Source("p", (tmp_path / "p.idx",), 1, DataOptions())], SETTINGS)
    assert len(rows) == 1 and not folder.exists()


def test_memory_is_not_for_tokens(folder, corpus, tmp_path):
    """4 million tokens: a second process may not grow by half of what they take in its first steps."""
    path = tmp_path / "a.txt"
    path.write_text("tick tock " * 400_000)
    cached_store(replace(corpus, files=(str(path),)))
    code = f"""
from rwkv_miss.config import DataOptions
from rwkv_miss.data.batches import BatchStream
from rwkv_miss.data.parts import PartSettings, read_parts
from rwkv_miss.data.sources import parse_sources
def anonymous():
    line = next(line for line in open("/proc/self/status") if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024
sources = parse_sources({str(path)!r}, DataOptions())
before = anonymous()
[(rows, _)] = read_parts(
    sources, PartSettings("bytes", 256, 512, packing=True, carry=False, group_size=None, val_split=0.0, seed=3)
)
rows.fingerprint()
stream = BatchStream(
    rows, batch_size=8, accumulate=2, rank=1, world_size=2, seed=0, shuffle=True, trim=True
)
for _, batch in zip(range(8), stream):
    assert batch["tokens"].shape == (8, 512)
print(len(rows), anonymous() - before)
"""
    done = run_process([sys.executable, "-c", code], timeout=120)
    assert done.returncode == 0, done.stderr
    rows, grown = map(int, done.stdout.split())
    assert rows >= 4e6 / 512
    assert grown < 4e6
