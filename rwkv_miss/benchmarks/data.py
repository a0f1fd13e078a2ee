"""Times how files become tokens, and how a run starts on tokens that are there, and measures the memory of both."""

from __future__ import annotations

import csv
import json
import os
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from rwkv_miss.benchmarks.common import Table, apart, resident
from rwkv_miss.config import DataOptions
from rwkv_miss.data.batches import BatchStream
from rwkv_miss.data.corpus import Corpus, id_dtype, read_tokens
from rwkv_miss.data.documents import all_documents
from rwkv_miss.data.packing import make_rows
from rwkv_miss.data.store import open_store, write_store
from rwkv_miss.data.tokenizers import load_tokenizer

SIZES = {".jsonl": 1_000_000_000, ".csv": 100_000_000, ".parquet": 100_000_000}
"""Bytes that each file's records take as .jsonl."""
CTX_LEN = 1024
# Characters of a question and of its answer.
_QUESTION, _ANSWER = 250, 300
# Bytes of records that are not the same, of which a file is made by repetition.
_UNLIKE = 20_000_000


def bench_data(thread_count: int) -> Table:
    """Files of questions and answers as World tokens in up to `thread_count` processes, from the file to the arrays in
    the folder for temporary files, and then a run's start on these. Questions and answers are source code of Python's
    standard library.

    Returns:
        A table with a row for each of `SIZES`: name; mb, of the records as .jsonl; mb_per_s; mb_per_cpu_s, over the
        CPU time of all processes, which is a core's speed where other programs have a part of it; token_mb, what the
        ids take; rise_mb, by how much the memory of the process rises at its peak (resident, mapped files included)
        over what PyTorch and the tokenizer take; and the same of the start, until there is a first batch of rows of
        `CTX_LEN`, in a process of its own.
    """
    rows = []
    for suffix, size in SIZES.items():
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"records{suffix}"
            _WRITERS[suffix](path, size)
            written, row = apart(_tokenise, path, thread_count, size)
            rows.append({"name": suffix, "mb": size / 1e6, **row, **apart(_start, path.parent, written)})
    return Table(f"Files as World tokens, {thread_count} process(es), and a start on them", rows)


def _tokenise(path: Path, cores: int, size: int) -> tuple[dict[str, Any], dict[str, float]]:
    tokenizer = load_tokenizer("world")
    corpus = Corpus((str(path),), "world", tokenizer.vocab_size, DataOptions())
    memory, cpu, begin = resident("VmRSS"), _cpu_seconds(), time.perf_counter()
    written = write_store(path.parent, read_tokens(corpus, cores), id_dtype(tokenizer))
    seconds, cpu = time.perf_counter() - begin, _cpu_seconds() - cpu
    [dtype, length] = written["arrays"]["ids"]
    return written, {
        "mb_per_s": size / 1e6 / seconds,
        "mb_per_cpu_s": size / 1e6 / cpu,
        "token_mb": length * np.dtype(dtype).itemsize / 1e6,
        "rise_mb": (resident("VmHWM") - memory) / 1e6,
    }


def _cpu_seconds() -> float:
    """The CPU time of this process, and of those that it has started and that have ended."""
    return time.process_time() + sum(os.times()[2:4])


def _start(folder: Path, written: dict[str, Any]) -> dict[str, float]:
    load_tokenizer("world")
    before, begin = resident("VmRSS"), time.perf_counter()
    rows, _ = make_rows(all_documents(open_store(folder, "records", written)), CTX_LEN, packing=True)
    stream = BatchStream(rows, batch_size=8, accumulate=1, rank=0, world_size=1, seed=0, shuffle=True, trim=False)
    next(iter(stream))
    return {"start_seconds": time.perf_counter() - begin, "start_rise_mb": (resident("VmHWM") - before) / 1e6}


def _records() -> Iterator[dict[str, str]]:
    """About `_UNLIKE` bytes of records."""
    sources = sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py"))
    size = number = 0
    for path in sources:
        text = path.read_text(encoding="utf-8", errors="replace")
        for start in range(0, len(text) - _QUESTION - _ANSWER, _QUESTION + _ANSWER):
            stop = start + _QUESTION
            record = {"question": f"{number}. {text[start:stop]}", "answer": f"{text[stop : stop + _ANSWER]}."}
            yield record
            number, size = number + 1, size + len(_line(record))
            if size >= _UNLIKE:
                return


def _line(record: dict[str, str]) -> bytes:
    return json.dumps(record, ensure_ascii=False).encode() + b"\n"


def _repeated(size: int) -> Iterator[dict[str, str]]:
    records = [*_records()]
    while True:
        for record in records:
            size -= len(_line(record))
            if size < 0:
                return
            yield record


def _write_jsonl(path: Path, size: int) -> None:
    lines = b"".join(map(_line, _records()))
    with path.open("wb") as file:
        while file.tell() < size:
            file.write(lines)


def _write_csv(path: Path, size: int) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["question", "answer"])
        writer.writeheader()
        writer.writerows(_repeated(size))


def _write_parquet(path: Path, size: int) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([*_repeated(size)]), path)


_WRITERS = {".jsonl": _write_jsonl, ".csv": _write_csv, ".parquet": _write_parquet}
