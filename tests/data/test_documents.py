"""Records as tokens with a loss mask, and documents held out for validation."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest

from rwkv_miss.config import DataOptions
from rwkv_miss.data.documents import Document, encode_record, gather
from rwkv_miss.data.documents import split_validation as split
from rwkv_miss.data.records import Record, Turn
from rwkv_miss.data.tokenizers import load_tokenizer
from rwkv_miss.errors import UserError
from tests.data.samples import pairs, text_of

QUESTION = "Natalia sold clips to 48 of her friends in April, and half as many in May. How many in all?"
ANSWER = "In May: 48/2 = <<48/2=24>>24.\nIn all: 48+24 = <<48+24=72>>72.\n#### 72"
RECORD = Record("sums.jsonl:7", (Turn("user", QUESTION), Turn("assistant", ANSWER)))
VOCAB = {"world": 65536, "bytes": 256}
OPTIONS = DataOptions()


@pytest.mark.parametrize("name", VOCAB)
@pytest.mark.parametrize("answer_end", ["token", "blank_line"])
def test_loss_is_on_the_answer_and_its_end(name, answer_end):
    tokenizer = load_tokenizer(name)
    document = encode_record(RECORD, tokenizer, VOCAB[name], replace(OPTIONS, answer_end=answer_end))
    assert document.ids.dtype == np.int32 and document.mask.dtype == bool
    learned = document.ids[document.mask].tolist()
    assert learned[-1] == 0 and 0 not in learned[:-1]
    assert tokenizer.decode(learned[:-1]) == f" {ANSWER}" + ("" if answer_end == "token" else "\n\n")
    prompt = document.ids[~document.mask].tolist()
    assert prompt == tokenizer.encode(f"User: {QUESTION}\n\nAssistant:")  # as a runtime encodes it
    assert document.mask[len(prompt) :].all()


def test_loss_of_several_turns():
    turns = (Turn("user", "a"), Turn("assistant", "b"), Turn("user", "c"), Turn("assistant", "d"))
    tokenizer = load_tokenizer("bytes")
    document = encode_record(Record("f:1", turns), tokenizer, 256, OPTIONS)
    assert document.ids.tolist() == [*b"User: a\n\nAssistant: b\n\nUser: c\n\nAssistant: d", 0]
    assert document.ids[document.mask].tolist() == [*b" b\n\n d", 0]
    document = encode_record(Record("f:1", turns), tokenizer, 256, replace(OPTIONS, answer_end="blank_line"))
    assert document.ids.tolist() == [*b"User: a\n\nAssistant: b\n\nUser: c\n\nAssistant: d\n\n", 0]
    assert document.ids[document.mask].tolist() == [*b" b\n\n d\n\n", 0]


def test_all_of_a_text_but_its_first_token_carries_loss():
    document = encode_record(Record("f:1", (Turn("text", "abc"),)), load_tokenizer("bytes"), 256, OPTIONS)
    assert document.ids.tolist() == [97, 98, 99, 0]
    assert document.mask.tolist() == [False, True, True, True]


def test_a_token_outside_the_vocabulary():
    with pytest.raises(UserError) as error:
        encode_record(RECORD, load_tokenizer("world"), 256, OPTIONS)
    message = str(error.value)
    token = max(encode_record(RECORD, load_tokenizer("world"), 65536, OPTIONS).ids)
    assert message.startswith(f"sums.jsonl:7: token {token} (") and "vocabulary of 256 ids" in message
    assert "choose the tokenizer" in message
    text = Record("f:1", (Turn("text", "é"),))  # bytes 195, 169
    assert encode_record(text, load_tokenizer("bytes"), 196, OPTIONS).ids.max() == 195
    with pytest.raises(UserError, match="token 195"):
        encode_record(text, load_tokenizer("bytes"), 195, OPTIONS)


def test_the_end_token_inside_a_text():
    with pytest.raises(UserError, match=r"f:1: the text has token 0 of tokenizer bytes.*NUL"):
        encode_record(Record("f:1", (Turn("text", "a\0b"),)), load_tokenizer("bytes"), 256, OPTIONS)


def test_two_answers_to_compare_are_refused():
    record = RECORD._replace(rejected=(Turn("user", QUESTION), Turn("assistant", "no")))
    with pytest.raises(
        UserError, match=r"^sums.jsonl:7: has a chosen and a rejected answer, .* prompt_field and answer"
    ):
        encode_record(record, load_tokenizer("world"), 65536, OPTIONS)


def split_validation(documents, *arguments, **options):
    return [[*side[0]] for side in split([gather(documents)], *arguments, **options)]


def test_split_validation_draws_whole_documents():
    documents = [text_of([i, 1]) for i in range(20)]
    train, val = split_validation(documents, 0.25, seed=3)
    first = [[int(document.ids[0]) for document in side] for side in (train, val)]
    assert [len(side) for side in first] == [15, 5]
    assert sorted(first[0] + first[1]) == list(range(20))
    assert first == [sorted(side) for side in first]
    again = split_validation(documents, 0.25, seed=3)[1]
    assert [document.ids[0] for document in again] == first[1]
    other = split_validation(documents, 0.25, seed=4)[1]
    assert [document.ids[0] for document in other] != first[1]
    everything, nothing = split_validation(documents, 0, seed=3)
    assert pairs(everything) == pairs(documents) and nothing == []


def test_split_validation_of_one_text_holds_out_its_end():
    document = text_of(range(1, 12))
    train, val = split_validation([document], 0.3, seed=0)
    assert pairs(train) + pairs(val) == pairs([document])
    assert val[0].ids.tolist() == [8, 9, 10, 11]


@pytest.mark.parametrize(
    ("documents", "fraction", "said"),
    [
        ([text_of([1, 2])] * 10, 0.04, "val_split 0.04 of 10 documents is 0, which leaves nothing to validate on"),
        ([text_of([1, 2])] * 10, 0.96, "is 10, which leaves nothing to train on"),
        ([Document(np.array([1, 2, 3], np.int32), np.array([False, False, True]))], 0.5, "of 1 documents is 0"),
        ([text_of([1, 0])], 0.5, "of 1 tokens is 0"),
        ([text_of([1, 2])], 1.0, "val_split is 1.0; it must be at least 0 and less than 1"),
    ],
)
def test_split_validation_that_leaves_a_side_empty(documents, fraction, said):
    with pytest.raises(UserError, match=re.escape(said)):
        split_validation(documents, fraction, seed=0)


def test_split_validation_keeps_groups_together():
    documents = [text_of([i, 1]) for i in range(30)]
    train, val = split_validation(documents, 0.2, seed=3, group_size=3)
    first = [[int(document.ids[0]) for document in side] for side in (train, val)]
    assert [len(side) for side in first] == [24, 6] and sorted(first[0] + first[1]) == list(range(30))
    for side in first:
        assert side == sorted(side) and all(i % 3 == 0 for i in side[::3])
        assert side == [i for first in side[::3] for i in range(first, first + 3)]
    with pytest.raises(UserError, match="31 records do not make groups of 3: 1 are left over"):
        split_validation([*documents, text_of([1, 2])], 0.2, seed=3, group_size=3)
    with pytest.raises(UserError, match=r"val_split 0.5 of 1 groups is 0, which leaves nothing to validate on"):
        split_validation([text_of(range(1, 12))], 0.5, seed=0, group_size=1)  # one text is not cut
