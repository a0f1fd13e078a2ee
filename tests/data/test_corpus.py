"""Files as tokens: the same from one process and from several, block by block, and the same mistakes."""

from __future__ import annotations

import json

import numpy as np
import pytest

from rwkv_miss.config import DataOptions
from rwkv_miss.data import corpus as module
from rwkv_miss.data.corpus import Corpus, read_tokens
from rwkv_miss.data.documents import all_documents, encode_record
from rwkv_miss.data.readers import jsonl
from rwkv_miss.data.readers.reader import read_records
from rwkv_miss.data.store import store_in_memory
from rwkv_miss.data.tokenizers import load_tokenizer
from rwkv_miss.errors import UserError


@pytest.fixture(params=[0, 2])
def processes(request, monkeypatch) -> int:
    """Files are read in blocks of 500 bytes by so many processes."""
    monkeypatch.setattr(jsonl, "BLOCK_SIZE", 500)
    monkeypatch.setattr(module, "_BYTES_A_PROCESS", 100)
    monkeypatch.setattr(module, "usable_cores", lambda: request.param)
    return request.param


@pytest.fixture
def corpus(tmp_path) -> Corpus:
    """Two files: conversations and texts, blank lines among them, and in one of them unread fields."""
    records: list[dict] = [{"question": f"q{n}", "answer": "tick " * (n % 7 + 1)} for n in range(60)]
    records += [{"text": "x" * n} for n in range(1, 200, 5)]
    files = []
    for name, extra in (("a", {}), ("b", {"source": "web"})):
        files.append(str(tmp_path / f"{name}.jsonl"))
        with open(files[-1], "w") as file:
            file.writelines(json.dumps(record | extra) + "\n" * (1 + (i % 9 == 0)) for i, record in enumerate(records))
    return Corpus(tuple(files), "world", 65536, DataOptions())


def test_the_tokens_are_those_of_each_record(corpus, processes, caplog):
    parts = [*read_tokens(corpus)]
    assert len(parts) > 10 and {part.ids.dtype for part in parts} == {np.dtype(np.uint16)}
    found = all_documents(store_in_memory("a", parts))
    records = [record for file in corpus.files for record in read_records(file, corpus.options)]
    assert len(found) == len(records) == 200
    for document, record in zip(found, records, strict=True):
        wanted = encode_record(record, load_tokenizer("world"), 65536, corpus.options)
        assert document.ids.tolist() == wanted.ids.tolist() and document.mask.tolist() == wanted.mask.tolist()
    told = [message for message in caplog.messages if "not read" in message]
    assert len(told) == 2 and told[0] == told[1] and "b.jsonl" in told[0] and "'source' (100)" in told[0]


@pytest.mark.parametrize(
    ("line", "tokenizer", "vocab_size", "said"),
    [
        ("{", "world", 65536, r"b\.jsonl:41: is not JSON"),
        ('{"text": "\\u0000"}', "bytes", 256, r"b\.jsonl:41: the text has token 0"),
        (
            '{"text": "\u6c49"}',
            "world",
            256,
            r"b\.jsonl:41: token \d+ \('汉'\) of tokenizer world is not in the model's vocab",
        ),
    ],
)
def test_the_first_mistake_is_told(corpus, processes, tmp_path, line, tokenizer, vocab_size, said):
    """Whatever is wrong behind it, in the same block or in one that another process has."""
    lines = ['{"text": "a"}'] * 200
    lines[40] = line
    lines[41] = lines[150] = "["
    lines[42] = '{"text": "\\u0000"}'
    (tmp_path / "b.jsonl").write_text("\n".join(lines))
    corpus = Corpus((str(tmp_path / "b.jsonl"),), tokenizer, vocab_size, DataOptions())
    with pytest.raises(UserError, match=said):
        list(read_tokens(corpus))


def test_a_file_without_a_record(corpus, processes, tmp_path):
    (tmp_path / "b.jsonl").write_text("\n\n" * 2000)
    with pytest.raises(UserError, match=r"b\.jsonl: is empty: there is no record in it"):
        list(read_tokens(corpus))
