import pytest

from rwkv_miss.data.records import Record
from rwkv_miss.data.templates import Segment, answer_text, chat_prompt, prompt_text, render
from rwkv_miss.errors import UserError


def talk(*turns):
    return Record("f.jsonl:1", turns)


def test_question_and_answer():
    record = talk(("user", "How many?"), ("assistant", "Two.\n#### 2"))
    assert render(record) == [
        Segment("User: How many?\n\nAssistant:", False),
        Segment(" Two.\n#### 2\n\n", True),
    ]
    assert prompt_text(record) == "User: How many?\n\nAssistant:" == chat_prompt(" How many?\n")
    assert answer_text(record) == "Two.\n#### 2"


def test_system_and_several_turns():
    record = talk(
        ("system", "Be brief."),
        ("user", "Hi"),
        ("assistant", "Hello"),
        ("user", "One"),
        ("user", "Two"),
        ("assistant", "Three"),
        ("user", "not answered"),
    )
    segments = render(record)
    assert "".join(segment.text for segment in segments) == (
        "System: Be brief.\n\nUser: Hi\n\nAssistant: Hello\n\nUser: One\n\nUser: Two\n\nAssistant: Three\n\n"
    )
    assert [segment.text for segment in segments if segment.is_answer] == [" Hello\n\n", " Three\n\n"]
    assert prompt_text(record) + " " + answer_text(record) + "\n\n" == "".join(text for text, _ in segments)


@pytest.mark.parametrize(
    ("written", "clean"),
    [
        ("  a \n", "a"),
        ("a\n\nb", "a\nb"),
        ("a\n \t\n\n\nb\n\n c", "a\nb\n c"),
        ("a\r\n\r\nb\r\nc\rd", "a\nb\nc\nd"),
        ("a  \nb", "a  \nb"),
        ("a\n\nUser: b", "a\nUser: b"),
        ("<think>\n\n</think>\n\nYes", "<think>\n</think>\nYes"),
    ],
)
def test_blank_lines_in_a_turn_collapse(written, clean):
    record = talk(("user", written), ("assistant", written))
    assert "".join(text for text, _ in render(record)) == f"User: {clean}\n\nAssistant: {clean}\n\n"
    assert answer_text(record) == clean
    assert chat_prompt(written) == prompt_text(record)


def test_text_is_left_as_it_is():
    record = Record("f.txt:1", (("text", " a\r\n\n\nb "),))
    assert render(record) == [Segment(" a\r\n\n\nb ", True)]
    for function in (prompt_text, answer_text):
        with pytest.raises(UserError, match=r"f\.txt:1: plain text has no question"):
            function(record)
