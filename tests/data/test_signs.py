"""What is warned of in records on which a run could be trained all the same: each sign on both sides of its limit."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rwkv_miss.config import DataOptions
from rwkv_miss.data.copies import Copies
from rwkv_miss.data.filling import fill_of_batches, too_empty
from rwkv_miss.data.packing import check_losses, make_rows
from rwkv_miss.data.readers.reader import read_records
from rwkv_miss.data.records import Record, Turn
from rwkv_miss.data.signs import Signs
from tests.data.samples import conversation, text_of

SENTENCE = "It was a dark night. The rain fell on the town, as it always had. "  # 66 characters


def text(content, where="a:1"):
    return Record(where, (Turn("text", content),))


def answer(content, question="Why?", where="a:1"):
    return Record(where, (Turn("user", question), Turn("assistant", content)))


def said_of(records):
    signs = Signs()
    for record in records:
        signs.take(record)
    return list(signs.warnings())


def distinct(n):
    return [text(f"document {i}") for i in range(n)]


@pytest.mark.parametrize(
    "content",
    [
        "User: hi\n\nAssistant: hello",
        "\nSystem: be brief\n\nUser: hi\n\nAssistant: hello",
        "Human: hi\nAI: hello",
        "Q: 2 + 2?\nA: 4",
        "### Instruction:\nAdd.\n\n### Response:\n4",
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nhello",
        "[INST] hi [/INST] hello",
    ],
)
def test_plain_text_that_looks_like_a_conversation(content):
    (said,) = said_of([*distinct(99), text(content, "a:7"), text(content + "!")])
    assert "2 of 101 records are plain text that looks like a conversation, the first in a:7" in said
    assert said_of([*distinct(100), text(content)]) == []  # 1 of 101 is no more than 1 %


@pytest.mark.parametrize("content", ["User: hi", "The user: hi\n\nAssistant: hello", "Answer: 4", "Users\nA: 4"])
def test_other_plain_text(content):
    assert said_of([text(content)]) == []


def test_a_conversation_that_quotes_one_is_none():
    assert said_of([answer("User: hi\n\nAssistant: hello", "User: hi\n\nAssistant: hello")]) == []


def test_copies():
    records = distinct(1980)
    assert said_of([*records, *records[:20]]) == []  # 20 of 2,000 are no more than 1 %
    (said,) = said_of([*records, *records[:19], records[0], records[0]])
    assert "21 of 2,001 records are copies of earlier ones" in said
    assert said_of([*records[:10], *records[:10], *records[:9]]) == []  # too few to harm


def answers(lengths, ends="."):
    """Answers of so many characters, which are different from each other."""
    return [answer(f"{i:04}. {SENTENCE * 20}"[: n - 1] + ends) for i, n in enumerate(lengths)]


def test_answers_that_are_cut_off_at_a_length():
    others = [300 + i for i in range(380)]
    (said,) = said_of(answers([*others, *[1000] * 20]))
    assert "20 of 400 answers have exactly 1,000 characters, and none has more" in said
    assert said_of(answers([*others, *[1000] * 19])) == []  # too few to tell
    assert said_of(answers([*others, 299, *[1000] * 20])) == []  # 20 of 401 is less than 5 %
    assert said_of(answers([*others, *[1000] * 20, 1001])) == []  # one goes on
    assert said_of(answers([199] * 400)) == [] and said_of(answers([200] * 400))


def test_answers_that_end_in_the_middle_of_a_sentence():
    whole, cut = answers(range(300, 310)), answers(range(400, 410), "n")
    assert said_of([*whole, *cut]) == []  # half of them
    (said,) = said_of([*whole, *cut, answer(SENTENCE * 4 + "And so,", where="a:99")])
    assert "11 of 21 long answers end in the middle of a sentence" in said
    assert said_of(cut) == []  # too few to tell
    assert said_of(answers(range(300, 340), "9")) == []  # a number, as at the end of a sum
    assert said_of(answers(range(100, 140), "n")) == []  # short answers end as they like
    assert said_of([answer(f"{i} " + "word " * (60 + i)) for i in range(40)]) == []  # no sentence in it ends


def test_signs_of_parts_are_those_of_the_whole():
    records = [
        *distinct(3),
        *answers([300, 1000, 1000]),
        *answers([900], "n"),
        *[text("User: a\n\nAssistant: b")] * 2,
        *distinct(2),
    ]
    whole = Signs()
    for record in records:
        whole.take(record)
    for at in range(len(records) + 1):
        parts = Signs(), Signs()
        for i, record in enumerate(records):
            parts[i >= at].take(record)
        parts[0].join(parts[1])
        assert parts[0] == whole


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3))))
def test_copies_and_several_answers(asked):
    """Prompt 0 stands for plain text."""
    found = Copies()
    for prompt, said in asked:
        found.take(bytes([prompt, said]), bytes([prompt]) if prompt else None)
    copies = [(i, asked.index(pair)) for i, pair in enumerate(asked) if asked.index(pair) < i]
    several = []
    for i, (prompt, _) in enumerate(asked):
        first = next(j for j, (other, _) in enumerate(asked) if other == prompt)
        if prompt and asked[i] not in asked[:i] and first < i:
            several.append((i, first))
    assert [tuple(pair) for pair in found.copies().tolist()] == copies
    assert [tuple(pair) for pair in found.several_answers().tolist()] == several


def test_reading_a_file_warns(tmp_path, caplog):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "User: a\n\nAssistant: b"}) + "\n")
    with caplog.at_level(logging.WARNING, "rwkv_miss"):
        list(read_records(tmp_path / "a.jsonl", DataOptions()))
    assert "a.jsonl: 1 of 1 records are plain text that looks like a conversation" in caplog.text


def test_records_without_loss(caplog):
    def warned(without):
        documents = [conversation(3, 0)] * without + [conversation(3, 2)] * (200 - without)
        caplog.clear()
        check_losses(make_rows(documents, 16, packing=True)[1], "a.jsonl", allow_dropping=False)
        return caplog.text

    assert "a.jsonl: 3 of 200 records have no token that carries loss" in warned(3)
    assert warned(2) == ""


def test_the_fill_of_rows_that_are_computed_together():
    assert fill_of_batches(np.array([4, 4, 4]), np.array([4, 4, 4]), 2) == 1
    assert fill_of_batches(np.array([1, 1, 1, 5]), np.array([1, 1, 1, 5]), 4) == 8 / 20
    assert fill_of_batches(np.array([1, 1, 1, 5]), np.array([1, 1, 1, 5]), 1) == 1
    # What lies behind the last target of all rows is not computed, so it counts on neither side.
    assert fill_of_batches(np.array([1, 5]), np.array([1, 2]), 2) == 3 / 4


def test_rows_that_are_nearly_empty():
    assert too_empty(0.5, packing=False) is None and too_empty(0.5, packing=True) is None
    assert "packing is off" in too_empty(0.499, packing=False)
    assert "lower ctx_len" in too_empty(0.499, packing=True)


def test_fill_is_that_of_the_batches_of_an_epoch():
    """Compared with what the stream of batches counts: the order is another one, so the figures are near each other."""
    from rwkv_miss.data.batches import BatchStream

    documents = [text_of(range(1, n + 2)) for n in [1, 2, 3, 5, 8, 13, 21, 34] * 40]
    rows, _ = make_rows(documents, 64, packing=False)
    settings = {"accumulate": 1, "rank": 0, "world_size": 1, "seed": 0, "shuffle": True, "trim": True}
    batches = list(BatchStream(rows, batch_size=4, **settings))
    counted = sum(batch["filled"] for batch in batches) / sum(batch["positions"] for batch in batches)
    assert fill_of_batches(rows.filled, rows.used, 4) == pytest.approx(counted, abs=0.03)
