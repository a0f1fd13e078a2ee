"""`rwkv-miss eval` with answers: its figures, its file of answers, and what it refuses. tests/harness compares figures
with lm-evaluation-harness."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from rwkv_miss import cli, load_model
from rwkv_miss.data.records import Record, Turn
from rwkv_miss.evaluating.choice import judge_choice
from rwkv_miss.evaluating.likelihood import Likelihood, likelihoods

PARSER = functools.cache(cli._parser)
QUESTION = {"question": "1 + 1?", "answer": "two\n#### 2"}
CHOICES = {"question": "q", "choices": ["x", "yes, the longer one"], "answer": "B"}
TEXT = {"text": "in the beginning was the word"}


@pytest.fixture
def base(make_base) -> Path:
    return make_base(vocab_size=256)


@pytest.fixture
def evaluate(base, tmp_path, capsys, monkeypatch) -> Callable[..., tuple[int, str, str]]:
    """`evaluate(records, *options)`: the status of `rwkv-miss eval` on them, and its output and messages."""

    monkeypatch.setattr(cli, "_parser", PARSER)

    def run(records: list[dict], *options: str) -> tuple[int, str, str]:
        data = tmp_path / "data.jsonl"
        data.write_text("".join(json.dumps(record) + "\n" for record in records))
        capsys.readouterr()
        status = cli.main(
            ["eval", f"--model={base}", f"--data={data}", "--tokenizer=bytes", "--max_tokens=30", *options]
        )
        return status, *capsys.readouterr()

    return run


def test_figures_of_samples(evaluate, monkeypatch, tmp_path):
    records = [QUESTION, {"question": "2 + 2?", "answer": "#### 4"}]
    file = tmp_path / "new" / "answers.jsonl"
    options = ["--extract=gsm8k", "--samples=3", "--pass_at=1,2", "--temperature=0.5", f"--answers={file}"]
    said = iter(["#### 2", "2", "#### 2.", "4", "#### 5", ""])
    monkeypatch.setattr("rwkv_miss.evaluating.answers.write", lambda *_: list(said))
    status, out, _ = evaluate(records, *options, "--json")
    assert status == 0
    found = json.loads(out)
    assert (found["right"], found["of"], found["rate"]) == (2, 6, pytest.approx(1 / 3))
    assert found["standard_error"] == pytest.approx(1 / 3)  # of the records' rates, 2/3 and 0
    assert found["pass_at"]["1"]["rate"] == pytest.approx(1 / 3) and found["pass_at"]["2"]["rate"] == 0.5
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["sample"] for line in lines] == [0, 1, 2] * 2
    assert [line["given"] for line in lines] == ["#### 2", "2", "#### 2.", "4", "#### 5", ""]
    assert [line["extracted"] for line in lines] == ["2", None, "2", None, "5", None]
    assert [line["right"] for line in lines] == [True, False, True, False, False, False]
    assert lines[3] == {
        "record": f"{tmp_path / 'data.jsonl'}:2",
        "prompt": "User: 2 + 2?\n\nAssistant:",
        "expected": "#### 4",
        "given": "4",
        "right": False,
        "sample": 0,
        "extracted": None,
    }
    said = iter(["#### 2", "2", "#### 2.", "4", "#### 5", ""])
    status, out, _ = evaluate(records, *options, "--overwrite")
    assert out.splitlines()[-3:] == ["gsm8k: 2 of 6 (33.3% ± 33.3%)", "pass@1: 33.3% ± 33.3%", "pass@2: 50.0% ± 50.0%"]


def test_samples_are_drawn_as_the_options_say(evaluate, tmp_path):
    file = tmp_path / "answers.jsonl"

    def drawn(*options: str) -> set[str]:
        how = ["--extract=last_number", "--samples=4", f"--answers={file}", "--overwrite", "--max_tokens=9"]
        assert evaluate([QUESTION], *how, *options)[0] == 0
        return {json.loads(line)["given"] for line in file.read_text().splitlines()}

    warm = drawn("--temperature=2")
    assert len(warm) == 4 and warm == drawn("--temperature=2", "--batch_size=3")
    assert warm.isdisjoint(drawn("--temperature=2", "--seed=1"))
    assert len(drawn("--temperature=2", "--top_p=1e-6")) == 1


@pytest.mark.parametrize("answer", ["B", 1, "1", "yes, the longer one"])
@pytest.mark.parametrize("lead", [False, True])
def test_a_choice(evaluate, base, tmp_path, answer, lead):
    file = tmp_path / "answers.jsonl"
    options = ["--extract=choice", f"--answers={file}", f"--lead_token={lead}"]
    status, out, _ = evaluate([{**CHOICES, "answer": answer}], *options, "--json")
    assert status == 0
    before = [0] * lead + list(b"User: q\n\nAssistant:")
    expected = likelihoods(load_model(base), [(before, list(f" {x}".encode())) for x in CHOICES["choices"]], 1)
    x, longer = (likelihood.log_p for likelihood in expected)
    assert x > longer and x / 1 < longer / 19  # the shorter one is likelier, but not by its length
    [line] = [json.loads(line) for line in file.read_text().splitlines()]
    assert line["log_likelihoods"] == pytest.approx([x, longer]) and line["given"] == "x"
    assert (line["expected"], line["right"], line["right_by_length"]) == (CHOICES["choices"][1], False, True)
    found = json.loads(out)
    assert (found["right"], found["of"], found["standard_error"]) == (0, 1, None)
    assert found["by_length"]["right"] == 1
    status, out, _ = evaluate([CHOICES] * 2, *options, "--overwrite")
    assert out.splitlines()[-2:] == ["choice: 0 of 2 (0.0% ± 0.0%)", "choice by length: 2 of 2 (100.0% ± 0.0%)"]


def test_the_length_of_a_choice_is_its_characters():
    """As in lm-evaluation-harness's acc_norm: not its tokens or bytes."""
    record = Record("here", (Turn("user", "q"), Turn("assistant", "abcdef")), choices=("öööö", "abcdef"))
    found = judge_choice(record, [("q", "öööö"), ("q", "abcdef")], [Likelihood(-4.1, False), Likelihood(-6.0, False)])
    assert not found.is_right and found.is_right_by_length


def test_choices_of_another_name_with_labels(evaluate):
    record = {"ctx": "q", "ends": {"text": ["x", "yes, the longer one"], "label": ["1", "0"]}, "key": "0"}
    names = ["--prompt_field=ctx", "--answer_field=key", "--choices_field=ends", "--extract=choice", "--json"]
    status, out, _ = evaluate([record], *names)
    assert status == 0 and json.loads(out)["by_length"]["right"] == 1


@pytest.mark.parametrize("lead", [False, True])
def test_last_words(evaluate, base, lead):
    status, out, _ = evaluate([TEXT, {"text": "a b \n"}], "--extract=lambada", f"--lead_token={lead}", "--json")
    assert status == 0
    pairs = [(b"in the beginning was the", b" word"), (b"a", b" b")]
    expected = likelihoods(load_model(base), [([0] * lead + list(x), list(y)) for x, y in pairs], 1)
    found = json.loads(out)
    assert found["word_perplexity"] == pytest.approx(math.exp(-sum(x.log_p for x in expected) / 2))
    assert (found["right"], found["of"]) == (0, 2)
    status, out, _ = evaluate([TEXT], "--extract=lambada")
    assert out.splitlines()[-1].startswith("perplexity of the last words: ")
    assert "in the beginning was the\n  [wrong, expected: word]" in out


@pytest.mark.parametrize(
    ("record", "options", "said"),
    [
        (QUESTION, ["--extract=gsm9k"], "extract is 'gsm9k'; it must be one of gsm8k, last_number, json, regex:"),
        (QUESTION, ["--extract=regex:("], "extract: '(' is not a regular expression"),
        (QUESTION, ["--extract=json"], "data.jsonl:1: extract finds nothing in the answer 'two\\n#### 2'"),
        (QUESTION, ["--extract=choice"], "data.jsonl:1: has no choices to choose from"),
        (TEXT, ["--extract=choice"], "data.jsonl:1: has no choices to choose from"),
        (QUESTION, ["--extract=lambada"], "data.jsonl:1: is no plain text of several words"),
        ({"text": "word"}, ["--extract=lambada"], "data.jsonl:1: is no plain text of several words"),
        (TEXT, ["--extract=gsm8k"], "data.jsonl:1: plain text has no question and answer"),
        ({**CHOICES, "choices": ["a\0", "b"]}, ["--extract=choice"], "data.jsonl:1: the text has token 0 of tokenizer"),
        (QUESTION, ["--extract=gsm8k", "--exact_match"], "exact_match and extract are both given; choose one"),
        (QUESTION, ["--samples=2"], "samples is given, but no answers are asked for; give exact_match or extract"),
        (QUESTION, ["--answers=a.jsonl"], "answers is given, but no answers are asked for"),
        (QUESTION, ["--exact_match", "--samples=2"], "samples is 2, but with temperature 0 they are all the same"),
        (QUESTION, ["--exact_match", "--pass_at=1,5"], "pass_at has 5; it must be from 1 to samples, which is 1"),
        (QUESTION, ["--exact_match", "--pass_at=0"], "pass_at has 0; it must be from 1 to samples"),
        (QUESTION, ["--exact_match", "--pass_at=[]"], "pass_at is empty"),
        (QUESTION, ["--exact_match", "--samples=0"], "samples is 0; it must be at least 1"),
        (QUESTION, ["--exact_match", "--temperature=-1"], "temperature is -1.0; it cannot be negative"),
        (QUESTION, ["--exact_match", "--temperature=1", "--top_p=0"], "top_p is 0.0; it must be above 0"),
        (QUESTION, ["--exact_match", "--temperature=1", "--seed=-1"], "seed is -1; it must be from 0"),
        (QUESTION, ["--exact_match", "--lead_token"], "lead_token is given, but only extract choice and lambada"),
        (CHOICES, ["--extract=choice", "--temperature=1"], "temperature is given, but with extract choice nothing is"),
        (QUESTION, ["--exact_match", "--answers=a.txt"], "a.txt: answers are written as .jsonl"),
        (QUESTION, ["--exact_match", "--answers=old.jsonl"], "old.jsonl: exists already; give another name as answers"),
        (QUESTION, ["--exact_match", "--answers=folder.jsonl"], "folder.jsonl: is a folder"),
        (QUESTION, ["--choices_field=c", "--text_field=t"], "text_field cannot be combined with choices_field"),
    ],
)
def test_what_is_refused(evaluate, tmp_path, monkeypatch, record, options, said):
    monkeypatch.chdir(tmp_path)
    Path("old.jsonl").write_text("old")
    Path("folder.jsonl").mkdir()
    status, out, err = evaluate([record], *options)
    assert status == 2 and said in err.splitlines()[-1] and out == ""
    assert {path.name for path in tmp_path.iterdir()} == {"base.pth", "data.jsonl", "old.jsonl", "folder.jsonl"}
    assert Path("old.jsonl").read_text() == "old"


def test_answers_that_cannot_be_written(evaluate, tmp_path, full_disk):
    file = tmp_path / "answers.jsonl"
    with full_disk(1000):
        status, _, err = evaluate([QUESTION] * 9, "--exact_match", "--max_tokens=9", f"--answers={file}")
    assert status == 2 and "answers.jsonl: cannot be written" in err
    assert not file.exists() and not list(tmp_path.glob(".*"))
