"""A reader is one file and one line of a table: the toy's records are trained on, measured and written as a binidx."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from rwkv_miss.cli import main
from rwkv_miss.data.readers.reader import READERS, Reader
from rwkv_miss.errors import UserError
from tests.doors.toy_reader import sums_blocks, sums_records
from tests.training.runs import adapter, losses, quiet_train, small_config


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    monkeypatch.setitem(READERS, ".sums", Reader(sums_blocks, sums_records))


@pytest.fixture
def files(tmp_path):
    """The same records in the toy's format and as JSON lines."""
    (tmp_path / "a.sums").write_text("2+2=4;30+3=33;5+6=11")
    records = [{"question": q, "answer": a} for q, a in (("2+2", "4"), ("30+3", "33"), ("5+6", "11"))]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return tmp_path / "a.sums", tmp_path / "a.jsonl"


def test_training_on_it(base, files, tmp_path):
    runs = [replace(small_config(base, file, tmp_path / file.suffix[1:]), max_steps=2) for file in files]
    for config in runs:
        quiet_train(config)
    assert losses(runs[0].out) == losses(runs[1].out) and len(losses(runs[0].out)) == 2
    assert all(block.equal(adapter(runs[1].out)[name]) for name, block in adapter(runs[0].out).items())


def test_every_command_reads_it(base, files, tmp_path, capsys):
    figures = []
    for file in files:
        capsys.readouterr()
        assert main(["eval", f"--model={base}", f"--data={file}", "--tokenizer=bytes", "--json"]) == 0
        figures.append(json.loads(capsys.readouterr().out))
        out = tmp_path / f"{file.suffix[1:]}-corpus"
        assert main(["data", "binidx", f"--data={file}", "--tokenizer=bytes", f"--out={out}"]) == 0
    assert figures[0] == figures[1] and figures[0]["records"] == 3
    assert (tmp_path / "sums-corpus.bin").read_bytes() == (tmp_path / "jsonl-corpus.bin").read_bytes()


def test_its_errors_are_the_users(base, files, tmp_path):
    files[0].write_text("2+2=4;nothing")
    with pytest.raises(UserError, match=r"a\.sums: sum 2 is 'nothing'; expected QUESTION=ANSWER"):
        quiet_train(small_config(base, files[0], tmp_path / "run"))
