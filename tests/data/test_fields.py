"""Objects of named fields as records: conversations, tools, thoughts, histories, answers to compare, texts to fill."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_miss.config import DataOptions
from rwkv_miss.data.readers.fields import record_of
from rwkv_miss.data.records import Call, Record, Tool, Turn
from rwkv_miss.data.rendering import holds_stop, render, unused
from rwkv_miss.data.templates import TEMPLATES
from rwkv_miss.errors import UserError

QUESTION, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
Q, A = Turn("user", "q"), Turn("assistant", "a")
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}


def read(item, **options):
    return record_of("f:1", item, DataOptions(**options))


def talk(*messages, **fields):
    return {"messages": list(messages), **fields}


def test_messages_of_every_role():
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Turin"}'}}
    record = read(
        talk(
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "How is "}, {"type": "text", "text": "Turin?"}]},
            {"role": "assistant", "content": None, "reasoning_content": "Look.", "tool_calls": [call]},
            {"role": "tool", "content": "rain", "tool_call_id": "c1"},
            {"role": "assistant", "content": "Wet.", "tool_calls": None, "reasoning_content": ""},
            tools=[
                {"type": "function", "function": {"name": "weather", "description": "of now", "parameters": SCHEMA}}
            ],
            id=3,
        )
    )
    assert record == Record(
        "f:1",
        (
            Turn("system", "Be brief."),
            Turn("user", "How is Turin?"),
            Turn("assistant", "", thought="Look.", calls=(Call("weather", '{"city": "Turin"}'),)),
            Turn("tool", "rain"),
            Turn("assistant", "Wet."),
        ),
        ("messages[].tool_calls[].id", "messages[].tool_call_id", "id"),
        (Tool("weather", "of now", SCHEMA),),
    )


def test_sharegpt():
    said = [
        ("human", "q"),
        ("function_call", '{"name": "f", "arguments": {"x": "é"}}'),
        ("observation", "2"),
        ("gpt", "<think>hm</think>a"),
    ]
    item = {"conversations": [{"from": by, "value": text} for by, text in said], "system": "s"}
    item["tools"] = json.dumps([{"name": "f", "strict": True}])
    record = read(item)
    assert record.turns == (
        Turn("system", "s"),
        Q,
        Turn("assistant", "", calls=(Call("f", '{"x": "é"}'),)),
        Turn("tool", "2"),
        Turn("assistant", "<think>hm</think>a"),
    )
    assert record.tools == (Tool("f"),) and record.unread == ("tools[].strict",)
    assert read({"conversations": [QUESTION, ANSWER]}).turns == (Q, A)


@pytest.mark.parametrize("pair", [("instruction", "output"), ("question", "answer"), ("prompt", "completion")])
def test_system_and_history_beside_a_pair(pair):
    item = dict(zip(pair, "qa", strict=True)) | {"system": "s", "history": [["q1", "a1"]], "input": "x"}
    about = "x" if pair[0] == "instruction" else ""
    record = read(item)
    assert record.turns == (
        Turn("system", "s"),
        Turn("user", "q1"),
        Turn("assistant", "a1"),
        Turn("user", "q", about),
        A,
    )
    assert record.unread == (() if about else ("input",))
    assert read(item | {"system": None, "history": [], "input": " "}).turns == (Q, A)


def test_a_table_gives_all_messages_and_tools_the_same_columns():
    """What one of them lacks is null there, as in Parquet."""
    empty = {"from": None, "value": None, "role": None, "content": None, "tool_calls": None, "weight": None}
    assert read(talk(empty | QUESTION, empty | ANSWER)).turns == (Q, A)
    said = [empty | {"from": "human", "value": "q"}, empty | {"from": "gpt", "value": "a"}]
    assert read({"conversations": said}).turns == (Q, A)
    schema = {"properties": {"city": {"type": "string"}, "day": None}}
    record = read(talk(QUESTION, ANSWER, tools=[{"function": None, "name": "f", "parameters": schema}]))
    options = DataOptions(template="g1")
    assert "\n- f(city: string)\n" in render(record, options)[0].text and not unused(record, options)


def test_weights():
    item = talk(QUESTION, ANSWER | {"weight": 0}, QUESTION, ANSWER | {"weight": 1}, QUESTION, ANSWER)
    assert [turn.learned for turn in read(item).turns[1::2]] == [False, True, True]
    for learn in ("all", "last"):
        record = read(item, learn=learn)
        assert all(turn.learned for turn in record.turns) and record.unread == ("messages[].weight",)
    with pytest.raises(UserError, match=r"messages gives every answer the weight 0, .*give --learn all"):
        read(talk(QUESTION, ANSWER | {"weight": 0}))
    with pytest.raises(UserError, match=r"messages\[1\]: weight is 0.5; an answer is learned \(1\) or not \(0\)"):
        read(talk(QUESTION, ANSWER | {"weight": 0.5}))


@pytest.mark.parametrize(
    "item",
    [
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"question": "q", "chosen": "a", "rejected": "b"},
        {"prompt": [QUESTION], "chosen": [ANSWER], "rejected": [ANSWER | {"content": "b"}]},
        {"prompt": "q", "chosen": [QUESTION, ANSWER], "rejected": [QUESTION, ANSWER | {"content": "b"}]},
        {"chosen": [QUESTION, ANSWER], "rejected": [QUESTION, ANSWER | {"content": "b"}]},
    ],
)
def test_answers_to_compare(item):
    record = read(item)
    assert record.turns == (Q, A) and record.rejected == (Q, Turn("assistant", "b")) and not record.unread


def test_a_text_to_fill_in():
    record = read({"prefix": "def f(", "suffix": "", "middle": "x"})
    assert record.turns == (Turn("prefix", "def f("), Turn("suffix", ""), Turn("assistant", "x"))


@pytest.mark.parametrize(
    ("choices", "answer"),
    [
        (["Lima", "Turin", "C"], "Turin"),
        (["Lima", "Turin", "C"], "B"),
        (["Lima", "Turin", "C"], 1),
        (["Lima", "Turin", "C"], "1"),
        ({"text": ["Lima", "Turin"], "label": ["1", "0"]}, "0"),
        ({"text": ["Lima", "Turin"], "label": ["A", "B"]}, "B"),
        ({"text": ["1", "Turin", "0"]}, 1),
    ],
)
def test_choices(choices, answer):
    item = {"question": "q", "answer": answer, "choices": choices, "id": 5}
    texts = choices["text"] if isinstance(choices, dict) else choices
    record = read(item, choices_field="choices")
    assert record == Record("f:1", (Q, Turn("assistant", "Turin")), ("id",), choices=tuple(texts))
    named = {"prompt_field": "question", "answer_field": "answer", "choices_field": "choices"}
    assert read(item, **named) == record


def test_choices_are_read_where_they_are_asked_for_and_there():
    """The text of a choice that looks like a letter or a number means itself."""
    item = {"question": "q", "answer": "B", "choices": ["A", "C", "B"]}
    assert read(item) == Record("f:1", (Q, Turn("assistant", "B")), ("choices",))
    assert read(item, choices_field="choices").turns[1].content == "B"
    assert read({"question": "q", "answer": "a"}, choices_field="choices") == Record("f:1", (Q, A))
    assert read(talk(QUESTION, ANSWER, choices=["a", "b"]), choices_field="choices").unread == ("choices",)


@pytest.mark.parametrize(
    ("choices", "answer", "said"),
    [
        ("A) Lima", "A", "choices is a string; give a list of at least two texts"),
        (["Lima"], 0, "choices is a list; give a list of at least two texts"),
        ({"text": ["Lima", "Turin"], "label": ["A"]}, "A", "labels in choices are not as many as its 2 texts"),
        (["Lima", 5], 0, "'choices[1]' is a number, not a string"),
        (["Lima", " "], 0, "'choices[1]' is empty"),
        (["Lima", "Turin"], 2, "answer 2 is none of the 2 choices; give its text, its label (such as A) or its number"),
        (["Lima", "Turin"], -1, "answer -1 is none of the 2 choices"),
        (["Lima", "Turin"], True, "answer True is none of the 2 choices"),
        (["Lima", "Turin"], "C", "answer 'C' is none of the 2 choices"),
        (["Lima", "Turin"], None, "lacks the field 'answer'"),
    ],
)
def test_choices_that_are_refused(choices, answer, said):
    item = {"q": "q", "answer": answer, "choices": choices}
    with pytest.raises(UserError, match=re.escape(said)):
        read(item, prompt_field="q", answer_field="answer", choices_field="choices")


@pytest.mark.parametrize(
    ("item", "said"),
    [
        (talk({"role": "user", "content": [{"type": "image_url"}]}), "content[0] is of type 'image_url'; only text"),
        (talk({"role": "user", "content": ["x"]}), "content[0] is a string; only text can be learned"),
        (talk(QUESTION, {"role": "assistant", "content": None}), "messages[1]: field 'content' is null"),
        (talk(QUESTION, {"role": "assistant", "content": None, "tool_calls": []}), "messages[1]: field 'content' is"),
        (talk({"role": "user", "tool_calls": [{"name": "f"}]}), "messages[0]: lacks the field 'content'"),
        (talk(QUESTION, ANSWER | {"tool_calls": "f"}), "messages[1]: tool_calls is a string, not a list"),
        (talk(QUESTION, ANSWER | {"tool_calls": ["f"]}), "tool_calls[0] is a string, not an object"),
        (talk(QUESTION, ANSWER | {"tool_calls": [{}]}), "tool_calls[0]: lacks the field 'name'"),
        (
            talk(QUESTION, ANSWER | {"tool_calls": [{"name": "f", "arguments": "{"}]}),
            "tool_calls[0]: arguments is not JSON",
        ),
        (
            talk(QUESTION, ANSWER | {"tool_calls": [{"name": "f", "arguments": "[" * 10**5}]}),
            "tool_calls[0]: arguments is not JSON",
        ),
        (
            talk(QUESTION, ANSWER | {"tool_calls": [{"name": "f", "arguments": "[1]"}]}),
            "tool_calls[0]: arguments is a list, not an object",
        ),
        (talk(QUESTION, ANSWER, tools="f"), "f:1: tools is not JSON"),
        (talk(QUESTION, ANSWER, tools={"a": 1}), "tools is an object, not a list"),
        (talk(QUESTION, ANSWER, tools=[{"description": "d"}]), "tools[0]: lacks the field 'name'"),
        (talk(QUESTION, ANSWER | {"reasoning_content": ["x"]}), "field 'reasoning_content' is a list, not a string"),
        (
            talk({"role": "system", "content": "s"}, QUESTION, ANSWER, system="t"),
            "has a field 'system' and a system turn; remove one",
        ),
        (
            talk(QUESTION, {"role": "developer", "content": "s"}, ANSWER),
            "messages[1]: a system turn can only be the first",
        ),
        ({"conversations": [{"from": "bing", "value": "x"}]}, "conversations[0]: from 'bing' is not known; use system"),
        ({"conversations": [{"from": "human"}]}, "conversations[0]: lacks the field 'value'; found 'from'"),
        ({"question": "q", "answer": "a", "history": "h"}, "history is a string, not a list of [question, answer]"),
        ({"question": "q", "answer": "a", "history": [["q"]]}, "history[0] is a list, not [question, answer]"),
        ({"question": "q", "answer": "a", "history": [["q", None]]}, "history[0]: field 'answer' is null"),
        ({"chosen": "a", "rejected": "b"}, "chosen is no answer to a question; give one, and the question as prompt"),
        ({"prompt": "q", "chosen": [QUESTION], "rejected": "b"}, "chosen has no assistant turn"),
        (
            {"prompt": "other", "chosen": [QUESTION, ANSWER], "rejected": "b"},
            "chosen is a conversation that does not begin with what is asked",
        ),
        (
            {"prompt": "p", "completion": "c", "chosen": "a", "rejected": "b"},
            "more than one form: prompt/completion and",
        ),
        ({"prefix": "p", "suffix": "s", "middle": ""}, "field 'middle' is empty"),
    ],
)
def test_what_is_refused(item, said):
    with pytest.raises(UserError) as error:
        read(item)
    assert str(error.value).startswith("f:1: ") and said in str(error.value)


# What may stand in a field: strings that fit often, and whatever else JSON has.
WORDS = st.sampled_from(
    ["q", "a", "", " ", "<think>b</think>c", "\ud800", "user", "assistant", "tool", "gpt", "{}", "{"]
)
NAMES = st.sampled_from(
    [*("role", "content", "from", "value", "name", "arguments", "function", "type", "text", "reasoning_content")]
)
VALUES = st.recursive(
    WORDS | st.none() | st.booleans() | st.sampled_from([0, 1, 0.5, 10**400]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=12,
)
CALLS = st.lists(st.fixed_dictionaries({"name": WORDS, "arguments": VALUES}) | VALUES, max_size=2)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": WORDS},
        optional={
            "content": WORDS | VALUES,
            "tool_calls": CALLS,
            "reasoning_content": WORDS,
            "weight": st.sampled_from([0, 1, "1"]),
        },
    ),
    max_size=4,
)
ITEMS = st.one_of(
    st.fixed_dictionaries({"messages": MESSAGES | VALUES}, optional={"tools": CALLS, "system": WORDS}),
    st.fixed_dictionaries({"question": WORDS, "answer": WORDS}, optional={"history": VALUES, "system": VALUES}),
    st.fixed_dictionaries({"chosen": MESSAGES | WORDS, "rejected": MESSAGES | WORDS}, optional={"prompt": VALUES}),
    st.fixed_dictionaries({"prefix": VALUES, "suffix": WORDS, "middle": WORDS}),
)


@settings(max_examples=200)
@given(ITEMS, st.sampled_from([*TEMPLATES]), st.sampled_from(["weighted", "all", "last"]))
def test_whatever_stands_in_the_fields_is_read_and_written_or_refused(item, template, learn):
    options = DataOptions(template=template, learn=learn)
    try:
        record = record_of("f:1", item, options)
        unused(record, options)
        text = "".join(span.text for span in render(record, options))
        holds_stop(record, options)
    except UserError as error:
        assert str(error).startswith("f:1: ")
    else:
        assert text.encode()
