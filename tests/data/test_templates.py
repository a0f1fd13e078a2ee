"""Each template against the strings that its models were trained on, token by token, and templates of the user's own.

The strings and the ids are those of BlinkDL's RWKV7-G1x-templates.txt, the RWKV documentation (instruction) and
rwkv_lightning (fim), written out."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest

from rwkv_miss.config import DataOptions
from rwkv_miss.data.documents import encode_record
from rwkv_miss.data.records import Call, Record, Tool, Turn
from rwkv_miss.data.rendering import Span, answer_text, chat_prompt, prompt_text, render, unused, without_thought
from rwkv_miss.data.templates import TEMPLATES, find_template, recorded, settled
from rwkv_miss.data.tokenizers import load_tokenizer
from rwkv_miss.errors import UserError
from rwkv_miss.generation.text_stream import Detokenizer, StopStrings

WORLD = load_tokenizer("world")
SYSTEM, Q, A = Turn("system", "Be\n\nbrief."), Turn("user", " 1 + 1?\r\n\r\nSay it.\n"), Turn("assistant", "2")
THINKING = Turn("assistant", "2", thought="\nOne and one.\n\nTwo.\n")
INLINE = Turn("assistant", "<think>\nOne and one.\n\nTwo.\n</think>\n\n2")
CALLING = Turn("assistant", "", calls=(Call("weather", '{"city": "Turin"}'),))
TOOLS = (Tool("weather", "The weather now.", {"properties": {"city": {"type": "string"}, "day": {}}}), Tool("time"))
ASKED = "User: 1 + 1?\nSay it."
THOUGHT = ">\nOne and one.\n\nTwo.\n</think>\n2"
EARLIER = (Turn("user", "Hi"), Turn("assistant", "<think>\nA greeting.\n</think>\nHello"))

# The template, the turns, the prompt that a runtime gives, and what the model writes after it.
OFFICIAL = [
    ("world", (Q, A), f"{ASKED}\n\nAssistant:", " 2"),
    ("world", (Q, INLINE), f"{ASKED}\n\nAssistant:", f" <think{THOUGHT[:-2]}\n\n2"),
    ("g1", (Q, A), f"{ASKED}\n\nAssistant:", " 2"),
    ("g1", (SYSTEM, Q, A), f"System: Be\nbrief.\n\n{ASKED}\n\nAssistant:", " 2"),
    ("g1", (*EARLIER, Q, INLINE), f"User: Hi\n\nAssistant: Hello\n\n{ASKED}\n\nAssistant:", " 2"),
    ("g1-think", (Q, THINKING), f"{ASKED}\n\nAssistant: <think", THOUGHT),
    ("g1-think", (Q, INLINE), f"{ASKED}\n\nAssistant: <think", THOUGHT),
    ("g1-think", (*EARLIER, Q, INLINE), f"User: Hi\n\nAssistant: Hello\n\n{ASKED}\n\nAssistant: <think", THOUGHT),
    ("g1-think", (Q, A), f"{ASKED}\n\nAssistant: <think>\n</think", ">\n2"),
    ("g1-think-some", (Q, THINKING), f"{ASKED} (think)\n\nAssistant: <think", THOUGHT),
    ("g1-think-a-bit", (Q, THINKING), f"{ASKED} (think a bit)\n\nAssistant: <think", THOUGHT),
    ("g1-think-a-lot", (Q, THINKING), f"{ASKED} (think a lot)\n\nAssistant: <think", THOUGHT),
    (
        "g1-think-a-lot",
        (*EARLIER, Q, INLINE),
        f"User: Hi\n\nAssistant: Hello\n\n{ASKED} (think a lot)\n\nAssistant: <think",
        THOUGHT,
    ),
    ("g1-fake-think", (Q, A), f"{ASKED}\n\nAssistant: <think>\n</think", ">\n2"),
    ("g1-fake-think-short", (Q, A), f"{ASKED}\n\nAssistant: <think></think", ">\n2"),
    (
        "g1",
        (Q, CALLING),
        f"{ASKED}\n\nAssistant:",
        ' ```json\n{"name": "weather", "arguments": {"city": "Turin"}}\n```',
    ),
    (
        "g1",
        (Q, CALLING, Turn("tool", '{"rain": true}'), Turn("assistant", "Wet.")),
        f'{ASKED}\n\nAssistant: ```json\n{{"name": "weather", "arguments": {{"city": "Turin"}}}}\n```\n\n'
        'User: Function output:\n{"rain": true}\n\nAssistant:',
        " Wet.",
    ),
    ("instruction", (Turn("user", "Add."), A), "Instruction: Add.\n\nResponse:", " 2"),
    ("instruction", (Turn("user", "Add.", "1\n\n1"), A), "Instruction: Add.\n\nInput: 1\n1\n\nResponse:", " 2"),
    (
        "fim",
        (Turn("prefix", "a = "), Turn("suffix", " + 1\n\n"), Turn("assistant", "b\n\nc")),
        "✿prefix✿✿suffix✿ + 1\n\n✿middle✿a = ",
        "b\n\nc",
    ),
    ("none", (Turn("user", "1 + 1 = "), A), "1 + 1 = ", "2"),
]


@pytest.mark.parametrize(("name", "turns", "prompt", "written"), OFFICIAL)
def test_the_tokens_of_the_official_strings(name, turns, prompt, written):
    """All that comes before the last answer is the prompt of a runtime, which encodes it as one; what the model writes
    begins with a token of its own."""
    options = DataOptions(template=name, learn="last")
    record = Record("f:1", turns)
    document = encode_record(record, WORLD, 65536, options)
    given, learned = WORLD.encode(prompt), [*WORLD.encode(written), 0]
    assert document.ids.tolist() == given + learned
    assert document.mask.tolist() == [False] * len(given) + [True] * len(learned)
    assert prompt_text(record, options) == prompt
    everything = encode_record(record, WORLD, 65536, DataOptions(template=name))
    assert everything.ids.tolist() == document.ids.tolist()
    answers = sum(turn.role == "assistant" for turn in turns)
    assert (everything.mask.sum() > document.mask.sum()) == (answers > 1)


def test_the_ids_are_those_that_others_name():
    document = encode_record(Record("f:1", (Turn("user", "你"), A)), WORLD, 65536, DataOptions(template="g1-think"))
    written = WORLD.encode("User:") + WORLD.encode(" 你") + [261, 5585, 41693, 59, 295, 35762, 63, 11, 754, 35762]
    assert document.ids.tolist() == [*written, 63, 11, *WORLD.encode("2"), 0]
    short = encode_record(Record("f:1", (Q, A)), WORLD, 65536, DataOptions(template="g1-fake-think-short")).ids.tolist()
    assert short[-8:-2] == [295, 35762, 5439, 35762, 63, 11]  # `></` is one token, and `>` after it another


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_prompt_of_a_question(name):
    if name == "fim":
        with pytest.raises(UserError, match="prompt: the template fim has no form for a turn of role user"):
            chat_prompt("q", TEMPLATES[name])
        return
    answer = THINKING if "-think-" in name or name == "g1-think" else A
    record = Record("f:1", (Q, answer))
    assert chat_prompt(Q.content, TEMPLATES[name]) == prompt_text(record, DataOptions(template=name))


def test_tools():
    record = Record("f:1", (SYSTEM, Q, CALLING), tools=TOOLS)
    lines = "Tools:\n- weather(city: string, day) The weather now.\n- time()\nReturn only a JSON function call."
    assert prompt_text(record, DataOptions(template="g1")).startswith(f"System: Be\nbrief.\n{lines}\n\n{ASKED}\n\n")
    record = Record("f:1", (Q, CALLING), tools=TOOLS)
    assert prompt_text(record, DataOptions(template="g1")).startswith(f"System: {lines}\n\n{ASKED}\n\n")
    assert answer_text(record, DataOptions(template="g1")).startswith("```json\n{")
    said = Record("f:1", (Q, Turn("assistant", "Let me see.", calls=CALLING.calls * 2)))
    call = '```json\n{"name": "weather", "arguments": {"city": "Turin"}}\n```'
    assert answer_text(said, DataOptions(template="g1")) == f"Let me see.\n{call}\n{call}"
    # A runtime that begins the call itself gives the same tokens.
    forced = WORLD.encode("Assistant: ```json") + WORLD.encode(call.removeprefix("```json"))
    assert WORLD.encode("Assistant:") + WORLD.encode(f" {call}") == forced


def test_thoughts_out_of_the_loss():
    record = Record("f:1", (Q, THINKING))
    given = ">\nOne and one.\n\nTwo.\n</think"
    spans = render(record, DataOptions(template="g1-think", learn_thoughts=False))
    assert spans == [Span(f"{ASKED}\n\nAssistant: <think", False), Span(given, False), Span(">\n2", True)]
    documents = [
        encode_record(record, WORLD, 65536, DataOptions(template="g1-think", learn_thoughts=learned))
        for learned in (True, False)
    ]
    assert documents[0].ids.tolist() == documents[1].ids.tolist()
    assert WORLD.decode(documents[1].ids[documents[1].mask].tolist()) == ">\n2"
    assert prompt_text(record, DataOptions(template="g1-think", learn_thoughts=False)) == spans[0].text


def test_which_answers_are_learned():
    turns = (Q, Turn("assistant", "a"), Q, Turn("assistant", "b", learned=False), Q, Turn("assistant", "c"))

    def learned(turns, learn):
        document = encode_record(Record("f:1", turns), WORLD, 65536, DataOptions(learn=learn))
        return WORLD.decode(document.ids[document.mask].tolist()), document.ids.tolist()

    texts, ids = zip(*(learned(turns, learn) for learn in ("all", "weighted", "last")), strict=True)
    assert texts == (" a\n\n b\n\n c", " a\n\n c", " c") and ids[0] == ids[1] == ids[2]
    assert learned(turns[:4], "weighted")[0] == " a"
    assert learned(turns[:4], "last")[0] == learned(turns[:4], "all")[0].removeprefix(" a\n\n") == " b"


@pytest.mark.parametrize(
    ("name", "written", "answer"),
    [
        ("world", " 2\n", "2"),
        ("world", " <think>hm</think>2", "<think>hm</think>2"),
        ("g1-think", THOUGHT, "2"),
        ("g1-think", ">\n</think>\n2 </think>", "2 </think>"),
        ("g1-think", ">\n2", "2"),
        ("g1-fake-think", ">\n2\n", "2"),
    ],
)
def test_the_answer_in_what_was_written(name, written, answer):
    assert without_thought(written, TEMPLATES[name]) == answer


def test_what_a_template_does_not_write_is_named():
    record = Record("f:1", (Q, THINKING, Q, Turn("assistant", "a", thought="hm", calls=CALLING.calls)), tools=TOOLS)
    named = {name: unused(record, DataOptions(template=name)) for name in ("world", "g1", "g1-think", "none")}
    assert named == {
        "world": ["tools", "tool_calls", "reasoning_content"],
        "g1": ["reasoning_content"],
        "g1-think": ["reasoning_content of earlier answers"],
        "none": ["tools", "tool_calls", "reasoning_content"],
    }
    inline = Record("f:1", (Q, INLINE))
    assert [unused(inline, DataOptions(template=name)) for name in ("world", "g1", "g1-think")] == [
        [],
        ["reasoning_content"],
        [],
    ]
    by_jinja = DataOptions(template=json.dumps({"jinja": JINJA}))
    assert unused(inline, by_jinja) == [] and unused(record, by_jinja) == ["tools", "tool_calls", "reasoning_content"]
    detailed = Tool("f", parameters={"properties": {"x": {"type": "string", "description": "d"}}})
    asked = Record("f:1", (Q, A), tools=(detailed,))
    assert unused(asked, DataOptions(template="g1")) == ["tools[].parameters, but for names and types"]
    assert unused(asked, DataOptions()) == ["tools"]
    whole = DataOptions(template=recorded(replace(TEMPLATES["g1"], name="own", tool_line="- {name} {schema}")))
    assert unused(asked, whole) == [] and f"- f {json.dumps(detailed.parameters)}\n" in prompt_text(asked, whole)
    assert unused(Record("f:1", (Turn("text", "<think>x</think>"),)), DataOptions(template="g1")) == []


@pytest.mark.parametrize(
    ("name", "turns", "said"),
    [
        ("world", (Q, A, Turn("tool", "x"), A), "the template world has no form for a turn of role tool"),
        ("instruction", (SYSTEM, Q, A), "the template instruction has no form for a turn of role system"),
        ("g1", (Turn("prefix", "a"), Turn("suffix", ""), A), "g1 has no form for a text to fill in; give another"),
        ("fim", (Q, A), "the template fim has no form for a turn of role user"),
        (
            "world",
            (Q, CALLING),
            "an answer only calls tools, and the template world does not write that; .*template g1",
        ),
        ("g1", (Q, Turn("assistant", "<think>hm</think>")), "an answer only thinks, and the template g1 does not"),
        (
            "g1-think",
            (Q, Turn("assistant", "<think>a</think>b", thought="c")),
            "a thought in reasoning_content and one",
        ),
    ],
)
def test_a_turn_that_a_template_has_no_form_for(name, turns, said):
    with pytest.raises(UserError, match=f"^f:1: .*{said}"):
        render(Record("f:1", turns), DataOptions(template=name))


@pytest.mark.parametrize("name", ["world", "g1", "g1-think", "instruction"])
@pytest.mark.parametrize("answer", ["好。", "Yes.", "a ", "a\n", "<", "</"])
def test_a_stop_is_found_by_its_text_whatever_its_tokens(name, answer):
    """After 。 the blank line is the tokens 28329 and 11 instead of 261, after a space 3336."""
    template = TEMPLATES[name]
    [stop] = template.stops
    ids = WORLD.encode(f" {answer}{stop} more")
    stream, stops, text, is_stopped = Detokenizer(WORLD), StopStrings(template.stops), "", False
    for token in ids:
        new, is_stopped = stops.push(stream.push(token))
        text += new
        if is_stopped:
            break
    assert is_stopped and text == f" {answer}"
    if answer == "好。":
        assert 261 not in ids and WORLD.encode(f"{answer}\n\n")[-2:] == [28329, 11]


# Templates of the user's own


CHATML = {
    "system": "<|im_start|>system\n{content}<|im_end|>\n",
    "user": "<|im_start|>user\n{content}<|im_end|>\n",
    "prompt": "<|im_start|>assistant\n",
    "answer": "{content}<|im_end|>",
    "end": "\n",
    "cleans": False,
    "stops": ["<|im_end|>"],
}
JINJA = """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.role == 'assistant' -%}
{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}
{%- else %}
{{- message.content + '<|im_end|>' }}
{%- endif %}
{{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif -%}
"""


def test_a_file_of_ones_own_is_the_template_that_it_says(tmp_path):
    path = tmp_path / "chatml.yaml"
    path.write_text(json.dumps(CHATML))  # which is YAML
    jinja = tmp_path / "chatml.jinja"
    jinja.write_text(JINJA)
    record = Record("f:1", (SYSTEM, Q, Turn("assistant", "a"), Q, Turn("assistant", "b"), Q))
    asked = f"<|im_start|>user\n{Q.content}<|im_end|>\n<|im_start|>assistant\n"
    for template in (path, jinja):
        options = DataOptions(template=str(template))
        first, answer, second, last = render(record, options)
        assert first == Span(f"<|im_start|>system\n{SYSTEM.content}<|im_end|>\n{asked}", False)
        assert (answer.text + second.text, last) == (f"a<|im_end|>\n{asked}", Span("b<|im_end|>", True))
        assert answer_text(record, options) == "b"
        assert prompt_text(record, options).endswith("a<|im_end|>\n" + asked)
        assert chat_prompt(Q.content, find_template(str(template))) == asked
    assert find_template(str(path)).stops == ("<|im_end|>",)


def test_a_jinja_is_written_as_by_transformers():
    """Text and masks are those of the library whose language it is."""
    theirs = pytest.importorskip("transformers.utils.chat_template_utils")
    turns = (SYSTEM, Q, Turn("assistant", "a"), Q, Turn("assistant", "b", calls=CALLING.calls))
    source = JINJA.replace(
        "message.content + '<|im_end|>' }}{%", "message.content ~ (message.tool_calls or '') | tojson }}{%"
    )
    messages = [{"role": turn.role, "content": turn.content} for turn in turns]
    call = {"name": "weather", "arguments": {"city": "Turin"}}
    messages[-1]["tool_calls"] = [{"type": "function", "function": call}]
    [text], [marked] = theirs.render_jinja_template(
        [messages], chat_template=source, return_assistant_tokens_mask=True, add_generation_prompt=False
    )
    spans = render(Record("f:1", turns), DataOptions(template=json.dumps({"jinja": source})))
    assert "".join(span.text for span in spans) == text.removesuffix("\n")
    assert [span.text for span in spans if span.learned] == [text[begin:end] for begin, end in marked]
    [asked], _ = theirs.render_jinja_template([messages[1:2]], chat_template=source, add_generation_prompt=True)
    assert chat_prompt(Q.content, find_template(json.dumps({"jinja": source}))) == asked


@pytest.mark.parametrize("name", [*TEMPLATES, "yaml", "jinja"])
def test_what_is_recorded_is_the_template_again_without_its_file(tmp_path, name):
    given = name
    if name in ("yaml", "jinja"):
        path = tmp_path / f"own.{name}"
        path.write_text(json.dumps(CHATML) if name == "yaml" else JINJA)
        given = str(path)
    options = settled(DataOptions(template=given))
    if given != name:
        path.unlink()
    assert (options.template == name) == (name in TEMPLATES)
    template = find_template(options.template)
    assert recorded(template) == options.template and settled(options) == options
    assert settled(DataOptions(), options.template) == options
    if name == "yaml":
        assert template.name == "own.yaml" and template.stops == ("<|im_end|>",)


def test_without_one_the_template_is_worlds(caplog):
    assert settled(DataOptions()).template == settled(DataOptions(), "rwkv-world").template == "world"
    assert settled(DataOptions(template="g1"), "g1").template == "g1" and not caplog.messages


def test_a_jinja_decides_how_answers_end():
    options = DataOptions(template=json.dumps({"jinja": JINJA}), answer_end="blank_line")
    with pytest.raises(UserError, match="answer_lines and answer_end are given, but a template in Jinja decides that"):
        settled(options)


def test_another_template_than_the_adapters_is_told(caplog):
    assert settled(DataOptions(template="world"), "g1").template == "world"
    assert settled(DataOptions(template="g1"), json.dumps(CHATML)).template == "g1"
    assert caplog.messages == [
        "template is world, but the adapter was trained with g1",
        "template is g1, but the adapter was trained with one of its own",
    ]


def test_what_an_adapter_records_names_no_file(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text(json.dumps(CHATML))
    with pytest.raises(UserError, match=r"the adapter was trained with a template '.*unknown here; give --template"):
        settled(DataOptions(), str(path))
    assert settled(DataOptions(template="g1"), str(path)).template == "g1"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("user: 'U: {content}'\nusr: x\n", "there is no field 'usr'; there are name, system, user, "),
        ("user: 'U: {contents}'\n", "user is 'U: {contents}', without {content}"),
        ("user: [a]\n", "user is ['a']; it must be a string"),
        ("user: 'U: {content}'\ncleans: 3\n", "cleans is 3; it must be true or false"),
        ("user: 'U: {content}'\nstops: x\n", "stops is 'x'; it must be a list of strings"),
        ("user: 'U: {content}'\nstops: ['']\n", "stops is ['']; it must be a list of strings"),
        ("user: 'U: {content}'\nthink_prompt: x\n", "after_thought is missing, for thoughts; thought is missing"),
        ("user: 'U: {content}'\nno_think_prompt: x\n", "after_thought is missing, for what follows no_think_prompt"),
        ("prompt: x\n", "neither user, fill_in nor jinja is given, so that it has no form for a question"),
        ("user: null\n", "neither user, fill_in nor jinja is given"),
        ("- a\n", "is no template; give its fields, such as user: 'User: {content}'"),
        ("a: [\n", "is not YAML"),
        ("jinja: '{% for %}'\n", "the template is not Jinja (line 1: "),
        ("usr: x\nuser: 3\n", "no field 'usr'; there are name, "),
        ("usr: x\nuser: 3\n", "; user is 3; it must be a string"),
    ],
)
def test_a_mistake_in_a_file_is_told(tmp_path, content, said):
    path = tmp_path / "own.yaml"
    path.write_text(content)
    with pytest.raises(UserError) as error:
        find_template(str(path))
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("g2", "there is no template 'g2'; there are world, g1, "),
        ("none.yaml", "none.yaml: no such file (template)"),
        ("", "there is no template ''"),
        ("{", "the template '{' is no name, file or JSON"),
    ],
)
def test_a_template_that_is_not_there(given, said):
    with pytest.raises(UserError, match=re.escape(said)):
        find_template(given)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("{{ messages[0].content }}", "has 0 of 1 answers between {% generation %} and {% endgeneration %}"),
        ("{{ raise_exception('no') }}", "f:1: the template cannot write this record: no"),
        ("{{ messages.clear() }}", "f:1: the template cannot write this record: access to attribute 'clear'"),
        ("{{ ''.__class__.__mro__ }}", "f:1: the template cannot write this record: access to attribute '__class__'"),
        ("{% for i in range(10**9) %}{% endfor %}", "the template cannot write this record: Range too big"),
        ("{{ messages[9].content }}", "f:1: the template cannot write this record: "),
    ],
)
def test_a_jinja_that_cannot_write_a_record(source, said):
    with pytest.raises(UserError, match=re.escape(said)):
        render(Record("f:1", (Q, A)), DataOptions(template=json.dumps({"jinja": source})))


def test_a_jinja_gets_what_transformers_gives():
    source = "{{ tools | tojson }}{{ messages[1] | tojson }}{% generation %}x{% endgeneration %}"
    options = DataOptions(template=json.dumps({"jinja": source}))
    record = Record("f:1", (Q, Turn("assistant", "é", thought="hm", calls=CALLING.calls)), tools=TOOLS[1:])
    text = render(record, options)[0].text
    assert text.startswith('[{"type": "function", "function": {"name": "time", "description": "", "parameters": {}}}]')
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Turin"}}}
    message = {"role": "assistant", "content": "é", "reasoning_content": "hm", "tool_calls": [call]}
    assert text.endswith(json.dumps(message, ensure_ascii=False))
    assert unused(record, options) == ["tool_calls", "reasoning_content"]  # the template names neither
