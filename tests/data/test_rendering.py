"""Records as text: which of it is learned, what is cleaned, and what ends an answer."""

from __future__ import annotations

import pytest

from rwkv_miss.config import DataOptions
from rwkv_miss.data.records import Record, Turn
from rwkv_miss.data.rendering import Span, answer_text, chat_prompt, holds_stop, prompt_text, render
from rwkv_miss.data.templates import TEMPLATES
from rwkv_miss.errors import UserError

WORLD = TEMPLATES["world"]
KEEP = DataOptions()
JOIN = DataOptions(answer_lines="join")
OLD = DataOptions(answer_lines="join", answer_end="blank_line")


def talk(*turns):
    return Record("f.jsonl:1", turns)


def text_of(record, options):
    return "".join(text for text, _ in render(record, options))


@pytest.mark.parametrize("options", [KEEP, OLD])
def test_question_and_answer(options):
    record = talk(Turn("user", "How many?"), Turn("assistant", "Two.\n#### 2"))
    assert render(record, options) == [
        Span("User: How many?\n\nAssistant:", False),
        Span(" Two.\n#### 2" + ("\n\n" if options is OLD else ""), True),
    ]
    assert prompt_text(record, options) == "User: How many?\n\nAssistant:" == chat_prompt(" How many?\n", WORLD)
    assert answer_text(record, options) == "Two.\n#### 2"


@pytest.mark.parametrize("options", [KEEP, OLD])
def test_system_and_several_turns(options):
    record = talk(
        Turn("system", "Be brief."),
        Turn("user", "Hi"),
        Turn("assistant", "Hello"),
        Turn("user", "One"),
        Turn("user", "Two"),
        Turn("assistant", "Three"),
        Turn("user", "not answered"),
    )
    end = "\n\n" if options is OLD else ""
    spans = render(record, options)
    assert "".join(span.text for span in spans) == (
        f"System: Be brief.\n\nUser: Hi\n\nAssistant: Hello\n\nUser: One\n\nUser: Two\n\nAssistant: Three{end}"
    )
    assert [span.text for span in spans if span.learned] == [" Hello\n\n", f" Three{end}"]
    assert prompt_text(record, options) + " " + answer_text(record, options) + end == text_of(record, options)


@pytest.mark.parametrize(
    ("written", "clean"),
    [
        ("  a \n", "a"),
        ("a\n\nb", "a\nb"),
        ("a\n \t\n\n\nb\n\n c", "a\n \t\nb\n c"),  # a line of white space does not end a turn
        ("a\r\n\r\nb\r\nc\rd", "a\nb\nc\rd"),
        ("a\r\n\n\r\nb", "a\nb"),
        ("a  \nb", "a  \nb"),
        ("a\n\nUser: b", "a\nUser: b"),
        ("<think>\n\n</think>\n\nYes", "<think>\n</think>\nYes"),
    ],
)
def test_blank_lines_of_users_collapse_and_those_of_answers_stay(written, clean):
    record = talk(
        Turn("system", written),
        Turn("user", written),
        Turn("assistant", written),
        Turn("user", "more"),
        Turn("assistant", "b"),
    )
    prompt = f"System: {clean}\n\nUser: {clean}\n\nAssistant:"
    assert text_of(record, KEEP) == f"{prompt} {written}\n\nUser: more\n\nAssistant: b"
    assert text_of(record, OLD) == f"{prompt} {clean}\n\nUser: more\n\nAssistant: b\n\n"
    last = talk(*record.turns[:3])
    assert text_of(last, KEEP) == f"{prompt} {written}" and answer_text(last, KEEP) == written.strip()
    assert text_of(last, JOIN) == f"{prompt} {clean}" and answer_text(last, JOIN) == clean
    assert text_of(last, OLD) == f"{prompt} {clean}\n\n" and answer_text(last, OLD) == clean
    assert chat_prompt(written, WORLD) == prompt_text(talk(*last.turns[1:]), KEEP)


def test_an_answer_that_ends_in_a_blank_line_keeps_it():
    record = talk(Turn("user", "q"), Turn("assistant", "a\n\n"))
    assert text_of(record, KEEP).endswith("Assistant: a\n\n")
    assert text_of(record, DataOptions(answer_end="blank_line")).endswith("Assistant: a\n\n\n\n")


def test_a_stop_inside_an_answer_is_told():
    record = talk(Turn("user", "q"), Turn("assistant", "a\n\nUser: b\n\nAssistant: c"))
    assert holds_stop(record, KEEP) and not holds_stop(record, JOIN)
    assert render(record, KEEP)[-1] == Span(" a\n\nUser: b\n\nAssistant: c", True)
    assert not holds_stop(talk(Turn("user", "a\n\nUser: b"), Turn("assistant", "c")), KEEP)
    assert not holds_stop(Record("f.txt:1", (Turn("text", "a\n\nUser: b"),)), KEEP)


def test_text_is_left_as_it_is():
    record = Record("f.txt:1", (Turn("text", " a\r\n\n\nb "),))
    assert render(record, OLD) == render(record, KEEP) == [Span(" a\r\n\n\nb ", True)]
    for function in (prompt_text, answer_text):
        with pytest.raises(UserError, match=r"f\.txt:1: plain text has no question"):
            function(record, KEEP)


def test_wrong_answer_options_are_problems():
    assert DataOptions(answer_lines="drop").problems() == ["answer_lines is 'drop'; it must be keep or join"]
    assert DataOptions(learn="first").problems() == ["learn is 'first'; it must be weighted, all or last"]
    assert DataOptions(answer_end="stop").problems() == ["answer_end is 'stop'; it must be token or blank_line"]
