"""Rows from the cache are those that were read, are read once, and are never those of other data or settings."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import pytest

from rwkv_miss.config import DataOptions
from rwkv_miss.data import cache
from rwkv_miss.data.batches import BatchStream
from rwkv_miss.data.binidx import write_binidx
from rwkv_miss.data.cache import cached_parts
from rwkv_miss.data.packing import Rows
from rwkv_miss.data.parts import PartSettings, read_parts
from rwkv_miss.errors import UserError
from rwkv_miss.files import locked
from tests.processes import finish, run_process


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Where the entries are; nothing else is in this cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "rwkv_miss" / "data"


@pytest.fixture
def settings(tmp_path) -> PartSettings:
    """24 records, of which one has a field that is not read and one an answer that a runtime cuts."""
    records: list[dict] = [{"question": f"q{n}", "answer": "tick " * (n % 7 + 1)} for n in range(24)]
    records[3]["source"] = "web"
    records[5]["answer"] += "\n\nUser: go on"
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return PartSettings(
        data=str(path),
        tokenizer="bytes",
        vocab_size=256,
        ctx_len=64,
        packing=True,
        carry=False,
        group_size=None,
        val_split=0.0,
        seed=0,
        options=DataOptions(),
    )


def entries(folder: Path) -> list[Path]:
    """The entries, and whatever else is there beside the locks."""
    return [path for path in folder.glob("*") if path.suffix != ".lock"]


def same(parts, others) -> bool:
    def equal(a, b):
        return (a is None and b is None) or (a.dtype == b.dtype and np.array_equal(a, b))

    return len(parts) == len(others) and all(
        report == other_report
        and (len(rows), rows.width, rows.fingerprint()) == (len(other), other.width, other.fingerprint())
        and all(
            equal(getattr(rows, name), getattr(other, name)) for name in ("loss_tokens", "used", "filled", "groups")
        )
        and all(equal(getattr(rows.take(np.arange(len(rows))), name), getattr(other, name)) for name in Rows.__slots__)
        and all(
            rows.has_loss(np.array([row]), columns) == other.has_loss(np.array([row]), columns)
            for row in range(len(rows))
            for columns in (slice(0, 20), slice(20, 64))
        )
        for (rows, report), (other, other_report) in zip(parts, others, strict=True)
    )


def refuse(*arguments, **options):
    raise AssertionError("this must not be called")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"packing": False, "val_split": 0.25, "seed": 3},
        {"group_size": 2, "val_split": 0.25},
        {"carry": True, "ctx_len": 30},
    ],
)
def test_what_was_read_is_found_again(folder, settings, monkeypatch, caplog, changes):
    settings = replace(settings, **changes)
    wanted = read_parts(settings)
    said = caplog.messages.copy()
    assert len(said) == 2 and "'source' (1)" in said[0] and "answers hold" in said[1]
    caplog.clear()
    made = cached_parts(settings)
    assert same(made, wanted) and caplog.messages == said
    caplog.clear()
    monkeypatch.setattr(cache, "read_parts", refuse)
    found = cached_parts(settings)
    assert same(found, wanted) and caplog.messages == said
    assert {record.levelname for record in caplog.records} == {"WARNING"}
    for rows, _ in [*made, *found]:
        arrays = [array for name in Rows.__slots__ if (array := getattr(rows.rows, name)) is not None]
        assert all(isinstance(array, np.memmap) and not array.flags.writeable for array in arrays) and len(arrays) >= 4


def test_a_process_that_shows_no_warnings_keeps_them_for_others(folder, settings, monkeypatch, caplog):
    with caplog.at_level("ERROR", "rwkv_miss"):
        cached_parts(settings)
        assert not caplog.messages
    cached_parts(settings)
    assert len(caplog.messages) == 2


def changed(value):
    """Another value of the same type."""
    if value is None or isinstance(value, str):
        return f"{value or ''}x"
    return not value if isinstance(value, bool) else value + 1


@pytest.mark.parametrize("name", [field.name for field in fields(PartSettings) if field.name != "options"])
def test_each_setting_has_its_entry(settings, name):
    shutil.copy(settings.data, f"{settings.data}x")  # what `changed` makes of the name: the content is the same
    assert cache._key(settings) == cache._key(replace(settings)) is not None
    assert cache._key(replace(settings, **{name: changed(getattr(settings, name))})) not in (None, cache._key(settings))


@pytest.mark.parametrize("name", [field.name for field in fields(DataOptions)])
def test_each_option_has_its_entry(settings, name):
    options = replace(settings.options, **{name: changed(getattr(settings.options, name))})
    assert cache._key(replace(settings, options=options)) not in (None, cache._key(settings))


@pytest.mark.parametrize("of", ["data", "tokenizer", "reader", "package"])
def test_another_content_has_another_entry(settings, tmp_path, monkeypatch, of):
    shutil.copytree(Path(cache.__file__).parent, tmp_path / "code")
    monkeypatch.setattr(cache, "__file__", str(tmp_path / "code" / "cache.py"))
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text("{}")
    settings = replace(settings, tokenizer=str(tokenizer))
    before = cache._key(settings)
    assert before == cache._key(settings)
    if of == "package":
        monkeypatch.setattr(cache, "version", lambda package: "0.0" if package == "tokenizers" else "1")
    else:
        files = {"data": settings.data, "tokenizer": tokenizer, "reader": tmp_path / "code" / "readers" / "jsonl.py"}
        with open(files[of], "a") as file:
            file.write("\n")
    assert cache._key(settings) not in (None, before)


def test_two_processes_read_once(folder, settings, tmp_path, start_process):
    """Both wait for a third that holds the lock, and say so; then one reads while the other waits."""
    code = f"""
import logging
from rwkv_miss.config import DataOptions
from rwkv_miss.data import cache, corpus, parts
logging.basicConfig(level=logging.INFO, format="%(message)s")
cache._PATIENCE = 0.01
encode = corpus.encode_record
def counted(record, *arguments):
    with open({str(tmp_path / "read")!r}, "a") as file:
        file.write(record.where + chr(10))
    return encode(record, *arguments)
corpus.encode_record = counted
settings = parts.PartSettings(**{asdict(settings) | {"options": None}} | {{"options": DataOptions()}})
[(rows, report)] = cache.cached_parts(settings)
print(rows.fingerprint(), type(rows).__name__, report)
"""
    key = cache._key(settings)
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
    [(rows, report)] = read_parts(settings)
    assert printed == [f"{rows.fingerprint()} CachedRows {report}\n"] * 2
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
def test_a_damaged_entry_is_made_again(folder, settings, caplog, damage):
    settings = replace(settings, val_split=0.25)
    wanted = read_parts(settings)
    cached_parts(settings)
    [entry] = entries(folder)
    names = sorted(path.name for path in entry.iterdir())
    assert len(names) == 2 * 6 + 1
    for name in names:
        caplog.clear()
        DAMAGES[damage](entry / name)
        assert same(cached_parts(settings), wanted), name
        assert sum("is damaged" in message for message in caplog.messages) == 1, name
        assert same(cached_parts(settings), wanted) and entries(folder) == [entry]
        assert sum("is damaged" in message for message in caplog.messages) == 1, name


@pytest.mark.parametrize("change", [lambda tokens: tokens[:-1], lambda tokens: tokens.astype(np.int64)])
def test_an_array_of_another_shape_or_dtype_is_damage(folder, settings, change):
    wanted = read_parts(settings)
    cached_parts(settings)
    [path] = folder.glob("*/0-tokens.npy")
    np.save(path, change(np.load(path)))
    assert same(cached_parts(settings), wanted)


def test_a_cache_that_cannot_be_made_is_a_warning(settings, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert same(cached_parts(settings), read_parts(settings))
    assert "rows cannot be cached (Not a directory); each process keeps its own in memory" in caplog.messages[0]


def test_a_full_disk_is_a_warning_and_leaves_nothing(folder, settings, full_disk, caplog):
    wanted = read_parts(settings)
    with full_disk(3000):
        assert same(cached_parts(settings), wanted)
    assert len([message for message in caplog.messages if "rows cannot be cached" in message]) == 1
    assert entries(folder) == []


def test_an_entry_in_a_folder_that_cannot_be_written_is_used(folder, settings, monkeypatch):
    cached_parts(settings)
    monkeypatch.setattr(cache, "read_parts", refuse)
    monkeypatch.setattr(cache, "locked", refuse)
    monkeypatch.setattr(os, "utime", lambda path: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    cached_parts(settings)


def test_mistakes_are_not_cached(folder, settings):
    for _ in range(2):
        with pytest.raises(UserError, match=r"token 116 \('t'\) of tokenizer bytes is not in the model's vocabulary"):
            cached_parts(replace(settings, vocab_size=116))
    with pytest.raises(UserError, match=r"none\.jsonl: cannot be read: No such file"):
        cached_parts(replace(settings, data="none.jsonl"))
    assert entries(folder) == []


def test_warnings_before_a_mistake_are_given(folder, settings, caplog):
    with pytest.raises(UserError, match="ctx_len 4 is too short"):
        cached_parts(replace(settings, ctx_len=4))
    assert len(caplog.messages) == 2


def test_a_file_that_changes_while_it_is_read_is_not_cached(folder, settings, monkeypatch):
    def read_and_change(settings):
        parts = read_parts(settings)
        with open(settings.data, "a") as file:
            file.write("\n")
        return parts

    monkeypatch.setattr(cache, "read_parts", read_and_change)
    cached_parts(settings)
    assert entries(folder) == []


def test_what_was_not_used_for_long_is_removed(folder, settings):
    others = [replace(settings, ctx_len=ctx_len) for ctx_len in (65, 66)]
    for other in others:
        cached_parts(other)
    old, used = (folder / cache._key(other) for other in others)
    half = folder / ".of-a-killed-process.1.part"
    half.mkdir()
    month = time.time() - 31 * 24 * 3600
    for path in (old, used, half):
        os.utime(path, (month, month))
    cached_parts(others[1])
    assert {old, used, half} == set(entries(folder))
    cached_parts(settings)
    assert set(entries(folder)) == {used, folder / cache._key(settings)}


def test_what_a_killed_process_left_is_removed(folder, settings):
    left = folder / f".{cache._key(settings)}.1.part"
    left.mkdir(parents=True)
    (left / "0-tokens.npy").write_bytes(b"half")
    cached_parts(settings)
    assert entries(folder) == [folder / cache._key(settings)]


def test_a_binidx_is_not_cached(folder, settings, tmp_path):
    write_binidx(tmp_path / "p", [[1, 2, 3], [4, 5]])
    [(rows, _)] = cached_parts(replace(settings, data=str(tmp_path / "p")))
    assert len(rows) == 1 and not folder.exists()


@pytest.mark.slow
def test_memory_is_not_for_rows(folder, settings, tmp_path):
    """4 million tokens, whose rows take 36 MB: a second process may not grow by a tenth of that in its first steps."""
    path = tmp_path / "a.txt"
    path.write_text("tick tock " * 400_000)
    cached_parts(replace(settings, data=str(path), ctx_len=512))
    code = f"""
from rwkv_miss.config import DataOptions
from rwkv_miss.data.batches import BatchStream
from rwkv_miss.data.cache import cached_parts
from rwkv_miss.data.parts import PartSettings
def anonymous():
    line = next(line for line in open("/proc/self/status") if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024
settings = {asdict(settings) | {"data": str(path), "ctx_len": 512, "options": None}}
before = anonymous()
[(rows, _)] = cached_parts(PartSettings(**settings | {{"options": DataOptions()}}))
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
    assert grown < 3.6e6


def test_batches_are_those_of_rows_in_memory(folder, settings):
    cached_parts(settings)
    streams = [
        BatchStream(
            make(settings)[0][0],
            batch_size=2,
            accumulate=2,
            rank=0,
            world_size=2,
            seed=0,
            shuffle=True,
            trim=True,
            window_len=20,
        )
        for make in (read_parts, cached_parts)
    ]
    for read, cached in zip(*streams, strict=True):
        assert read.keys() == cached.keys()
        assert all(np.array_equal(read[name], cached[name]) and type(read[name]) is type(cached[name]) for name in read)
