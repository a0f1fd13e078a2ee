r"""The RWKV World chat template: what a record looks like as text, and which of it the model learns.

    System: {s}\n\nUser: {q}\n\nAssistant: {a}\n\nUser: {q}\n\nAssistant: {a}\n\n

A runtime's prompt ends in `Assistant:`, so what the model has to produce, and what carries loss, is ` {a}` with
its leading space and then its end: `\n\n` after every answer, and token 0 (end of document, added when the
record is tokenised) after the last.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from rwkv_miss.data.records import Record
from rwkv_miss.errors import UserError


class Segment(NamedTuple):
    """A piece of a rendered record; the tokens of an answer segment carry loss."""

    text: str
    is_answer: bool


def render(record: Record) -> list[Segment]:
    """The record as segments; their texts joined are the whole text. Plain text is one answer segment.

    Conversations alternate prompt and answer segments. Turns after the last answer can bear on no loss and are
    left out.
    """
    if record.is_text:
        return [Segment(record.turns[0][1], True)]
    segments = []
    prompt = ""
    for role, content in record.turns:
        if role == "assistant":
            segments += [Segment(f"{prompt}Assistant:", False), Segment(f" {_clean(content)}\n\n", True)]
            prompt = ""
        else:
            prompt += f"{role.capitalize()}: {_clean(content)}\n\n"
    return segments


def prompt_text(record: Record) -> str:
    """The conversation up to and including its last `Assistant:`: the prompt to evaluate the last answer with."""
    _refuse_text(record)
    return "".join(segment.text for segment in render(record)[:-1])


def answer_text(record: Record) -> str:
    """The conversation's last answer, without the space before and the end after it."""
    _refuse_text(record)
    return render(record)[-1].text.strip()


def chat_prompt(question: str) -> str:
    """The prompt of a conversation's first question, ending in `Assistant:`."""
    return f"User: {_clean(question)}\n\nAssistant:"


def _clean(content: str) -> str:
    """Ends stripped, blank lines removed: within a turn two newlines in a row would read as its end."""
    lines = re.sub(r"\r\n?", "\n", content.strip())
    return re.sub(r"\n([^\S\n]*\n)+", "\n", lines)


def _refuse_text(record: Record) -> None:
    if record.is_text:
        raise UserError(f"{record.where}: plain text has no question and answer; give records that have them")
