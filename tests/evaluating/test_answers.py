"""What a model answers to the questions of records, and which of it is right."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from rwkv_miss.config import DataOptions
from rwkv_miss.data.records import Record, Turn
from rwkv_miss.data.rendering import prompt_text
from rwkv_miss.data.tokenizers import load_tokenizer
from rwkv_miss.errors import RunError, UserError
from rwkv_miss.evaluating.answers import answers
from rwkv_miss.evaluating.scoring import find_extractor
from rwkv_miss.generation.generate import generate
from rwkv_miss.generation.sampling import Sampling
from tests.evaluating.records import record
from tests.scripted import Scripted

OPTIONS = DataOptions()
BYTES = load_tokenizer("bytes")


def test_answers_keep_the_order_of_the_records(model):
    records = [record("a question " * n, "x") for n in (3, 1, 4, 2)]
    given = answers(model, BYTES, records, OPTIONS, Sampling(max_tokens=5), batch_size=3)
    assert [a.prompt for a in given] == [prompt_text(r, OPTIONS) for r in records]
    for a in given:
        assert a.given == generate(model, BYTES, [a.prompt], max_tokens=5)[0].strip()


def test_a_right_answer_is_an_equal_one():
    said = Scripted(b" 42\n\n\0", b" 41\0")
    given = answers(said, BYTES, [record("a", "42"), record("b", "42")], OPTIONS, Sampling(max_tokens=9), batch_size=2)
    assert [a.prompt for a in given] == ["User: a\n\nAssistant:", "User: b\n\nAssistant:"]
    assert [(a.expected, a.given, a.is_right) for a in given] == [("42", "42", True), ("42", "41", False)]


def test_answers_end_at_the_stops_of_the_template_and_are_compared_without_thoughts():
    thinking = Record("here", (Turn("user", "a"), Turn("assistant", "42", thought="hm")))
    said = Scripted(b">\n42\0", b">\nso\n</think>\n42\n\nUser: b")  # the longest prompt, the second, is asked first
    options = DataOptions(template="g1-think")
    given = answers(said, BYTES, [thinking, record("b", "42")], options, Sampling(max_tokens=40), batch_size=1)
    assert [a.prompt for a in given] == ["User: a\n\nAssistant: <think", "User: b\n\nAssistant: <think>\n</think"]
    assert [(a.expected, a.given) for a in given] == [("42", "42")] * 2


def test_a_question_that_is_answered_is_replaced_at_once():
    said = Scripted(b"long answer\0", b"b\0", b"c\0", b"dd\0", b"e\0")
    rows, done = [], []
    said.head.register_forward_hook(lambda _, inputs, output: rows.append(len(inputs[0])))
    records = [record("q" * (9 - i), "x") for i in range(5)]
    how = {"batch_size": 2, "report": lambda *x: done.append(x)}
    given = answers(said, BYTES, records, OPTIONS, Sampling(max_tokens=20), **how)
    assert [a.given for a in given] == ["long answer", "b", "c", "dd", "e"]
    # The first question takes 12 steps; beside it the others one after the other, each read when there is a place.
    assert rows == [2, 2, *[1, 1], 2, *[1, 1], 2, 2, *[1, 1], 2, 1, 1, 1]
    assert done[0] == (0, 5) and done[-1] == (5, 5) and done == sorted(done)


def test_logits_that_are_not_finite_end_the_answers(model):
    model.ln_out.weight.data[0] = math.nan
    with pytest.raises(RunError, match="logits are not finite"):
        answers(model, BYTES, [record("a", "b")], OPTIONS, Sampling(max_tokens=3), batch_size=2)


def test_a_right_answer_may_hold_a_blank_line():
    """What is expected is the answer as the model learned it."""
    asked = [record("a", " 4\n\n2\n")]
    [given] = answers(Scripted(b" 4\n\n2\0"), BYTES, asked, OPTIONS, Sampling(max_tokens=9), batch_size=2)
    assert given.expected == given.given == "4\n\n2" and given.is_right
    joined = DataOptions(answer_lines="join")
    [given] = answers(Scripted(b" 4\n\n2\0"), BYTES, asked, joined, Sampling(max_tokens=9), batch_size=2)
    assert given.expected == "4\n2" and not given.is_right


@pytest.mark.parametrize("batch_size", [4, 30])
def test_each_answer_has_random_numbers_of_its_own(model, batch_size):
    """Neither the batch nor the other records and answers matter."""
    records = [record("a question " * n, "x") for n in (3, 1, 3, 2)]
    sampling = Sampling(temperature=1.5, top_p=0.9, max_tokens=5, seed=3)
    found = answers(model, BYTES, records, OPTIONS, sampling, batch_size, samples=3)
    assert [(a.prompt, a.sample) for a in found] == [
        (prompt_text(r, OPTIONS), sample) for r in records for sample in range(3)
    ]
    assert len({a.given for a in found}) == 12
    assert answers(model, BYTES, records[:2], OPTIONS, sampling, 2, samples=2) == [*found[:2], *found[3:5]]
    again = answers(model, BYTES, records[:1], OPTIONS, replace(sampling, seed=4), 2, samples=3)
    assert not {a.given for a in again} & {a.given for a in found}


def test_what_is_found_in_an_answer_is_compared():
    asked = [record("a", "It is 4."), record("b", "It is 5.")]
    said = Scripted(b" So 2 + 2 = 4.0\0", b" Five!\0")
    found = answers(said, BYTES, asked, OPTIONS, Sampling(max_tokens=20), 2, extractor=find_extractor("last_number"))
    assert [(a.expected, a.given) for a in found] == [("It is 4.", "So 2 + 2 = 4.0"), ("It is 5.", "Five!")]
    assert [(a.extracted, a.is_right) for a in found] == [("4", True), (None, False)]


def test_an_answer_of_the_data_in_which_nothing_is_found():
    asked = [record("a", "#### 4"), Record("d.jsonl:2", record("b", "four").turns)]
    how = (BYTES, asked, OPTIONS, Sampling(max_tokens=9), 2)
    with pytest.raises(UserError, match=r"d\.jsonl:2: extract finds nothing in the answer 'four'"):
        answers(Scripted(), *how, extractor=find_extractor("gsm8k"))
    said = Scripted(b" #### 4\0", b" I: four\0")
    found = answers(said, *how, extractor=find_extractor(r"regex:[:#] *(\w+)"))
    assert [(a.extracted, a.is_right) for a in found] == [("4", True), ("four", True)]
