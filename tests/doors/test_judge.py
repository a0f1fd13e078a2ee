"""What answers are judged by is a function and a line of a table: an extractor, or a judge of likelihoods."""

from __future__ import annotations

import json

from rwkv_miss import load_model
from rwkv_miss.cli import main
from rwkv_miss.evaluating.extractors import EXTRACTORS, Extractor
from rwkv_miss.evaluating.likelihood import likelihoods
from rwkv_miss.evaluating.scoring import JUDGES
from tests.doors.toy_judge import JUDGE


def test_a_judge(base, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(JUDGES, "order", JUDGE)
    texts = ["one two three", "to be or not", "a b", "in the beginning was the word"]
    data, file = tmp_path / "data.jsonl", tmp_path / "answers.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    argv = ["eval", f"--model={base}", f"--data={data}", "--tokenizer=bytes", "--extract=order", f"--answers={file}"]
    assert main([*argv, "--json"]) == 0
    backwards = [" ".join(reversed(text.split())) for text in texts]
    pairs = [([10], list(text.encode())) for text in texts + backwards]
    log_p = [likelihood.log_p for likelihood in likelihoods(load_model(base), pairs, 8)]
    right = [forwards > other for forwards, other in zip(log_p[:4], log_p[4:], strict=True)]
    assert json.loads(capsys.readouterr().out)["right"] == sum(right)
    assert [json.loads(line)["right"] for line in file.read_text().splitlines()] == right


def test_an_extractor(base, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(EXTRACTORS, "first_letter", Extractor(lambda text: text[:1] or None))
    monkeypatch.setattr("rwkv_miss.evaluating.answers.write", lambda *_: [" Yes, it is", " No"])
    data = tmp_path / "data.jsonl"
    data.write_text('{"question": "a", "answer": "Y"}\n' * 2)
    assert main(["eval", f"--model={base}", f"--data={data}", "--tokenizer=bytes", "--extract=first_letter"]) == 0
    assert capsys.readouterr().out.endswith("first_letter: 1 of 2 (50.0% ± 50.0%)\n")
