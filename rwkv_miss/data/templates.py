r"""The RWKV World chat template: what a record looks like as text, and which of it the model learns.

    System: {s}\n\nUser: {q}\n\nAssistant: {a}\n\nUser: {q}\n\nAssistant: {a}

A runtime's prompt ends in `Assistant:`, so what the model has to produce, and what carries loss, is ` {a}` with its
leading space and then its end: `\n\n` after an answer that another turn follows; after the last one token 0 (the end
of the document, which is added when the record is tokenised), with `answer_end` "blank_line" a `\n\n` before it.

What the system and the user say is cleaned as BlinkDL's templates for RWKV-7 G1 demand
(BlinkDL/RWKV-LM, RWKV-v7/RWKV7-G1x-templates.txt): a blank line ends a turn, so there may be none inside. Answers
stay as they are unless `answer_lines` is "join".
"""

from __future__ import annotations

import re
from typing import NamedTuple

from rwkv_miss.config import DataOptions
from rwkv_miss.data.records import Record
from rwkv_miss.errors import UserError

STOP = "\n\nUser:"
"""Where a runtime stops an answer: the next turn begins."""


class Span(NamedTuple):
    """A stretch of a rendered record, and whether its tokens are learned (carry loss)."""

    text: str
    learned: bool


def render(record: Record, options: DataOptions) -> list[Span]:
    """The record as spans; their texts joined are the whole text. Plain text is one learned span, as it is.

    A conversation alternates spans of prompt and of answer. Turns after the last answer cannot affect the loss and
    are left out. An answer is learned whole, whatever it holds: one with `STOP` inside too, although a runtime would
    stop there (`read_records` warns of it).
    """
    if record.is_text:
        return [Span(record.turns[0].content, True)]
    spans = []
    prompt = ""
    for turn in record.turns:
        role, content = turn.role, turn.content
        if role == "assistant":
            spans += [Span(f"{prompt}Assistant:", False), Span(f" {_answer(content, options)}\n\n", True)]
            prompt = ""
        else:
            prompt += f"{role.capitalize()}: {_clean(content)}\n\n"
    if options.answer_end == "token":
        spans[-1] = Span(spans[-1].text.removesuffix("\n\n"), True)
    return spans


def prompt_text(record: Record, options: DataOptions) -> str:
    """The conversation up to and including its last `Assistant:`: the prompt to evaluate the last answer with.

    Raises:
        UserError: the record is plain text.
    """
    _refuse_text(record)
    return "".join(span.text for span in render(record, options)[:-1])


def answer_text(record: Record, options: DataOptions) -> str:
    """The conversation's last answer in the form that the model learns, without white space at its ends.

    Raises:
        UserError: the record is plain text.
    """
    _refuse_text(record)
    return render(record, options)[-1].text.strip()


def chat_prompt(question: str) -> str:
    """The prompt of a conversation's first question, ending in `Assistant:`."""
    return f"User: {_clean(question)}\n\nAssistant:"


def holds_stop(record: Record, options: DataOptions) -> bool:
    """Whether an answer of the record, in the form that the model learns, holds `STOP`."""
    return any(turn.role == "assistant" and STOP in _answer(turn.content, options) for turn in record.turns)


def _answer(content: str, options: DataOptions) -> str:
    return _clean(content) if options.answer_lines == "join" else content


def _clean(content: str) -> str:
    r"""Ends stripped, `\r\n` made `\n`, and each run of two or more `\n` made one. A lone `\r` and a line of white
    space stay."""
    return re.sub(r"\n{2,}", "\n", content.strip().replace("\r\n", "\n"))


def _refuse_text(record: Record) -> None:
    if record.is_text:
        raise UserError(f"{record.where}: plain text has no question and answer; give records that have them")
