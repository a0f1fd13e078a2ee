"""Templates as Jinja write what they write themselves."""

from __future__ import annotations

import jinja2
import pytest

from rwkv_miss.config import DataOptions
from rwkv_miss.data.chat_template import as_jinja
from rwkv_miss.data.records import Record, Turn
from rwkv_miss.data.rendering import chat_prompt, prompt_text
from rwkv_miss.data.templates import TEMPLATES, Template

CHATS = [name for name, template in TEMPLATES.items() if template.user]
QUESTION = " Is {this}\r\n\r\n\n 'so'? \\n \n"


def render(template: Template, messages: list[dict[str, str]], **values: object) -> str:
    """By Jinja alone, as runtimes call it."""
    env = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    env.globals["raise_exception"] = lambda message: pytest.fail(message)
    values = {"add_generation_prompt": True, **values}
    return env.from_string(as_jinja(template)).render(messages=messages, **values)


@pytest.mark.parametrize("name", CHATS)
def test_a_first_question(name):
    asked = render(TEMPLATES[name], [{"role": "user", "content": QUESTION}])
    assert asked == chat_prompt(QUESTION, TEMPLATES[name])


@pytest.mark.parametrize("name", ["world", "g1", "g1-think", "g1-think-a-bit", "g1-fake-think"])
def test_a_conversation(name):
    """As the prompt of a last answer without a thought; a runtime hands back answers with the space before them."""
    turns = [("system", "Be\n\ngood. "), ("user", QUESTION), ("assistant", "Yes.\n\nA {b}"), ("user", "And?")]
    record = Record("a", tuple(Turn(role, said) for role, said in [*turns, ("assistant", "No.")]))
    messages = [{"role": role, "content": f" {said}" if role == "assistant" else said} for role, said in turns]
    asked = render(TEMPLATES[name], messages, enable_thinking=False)
    assert asked == prompt_text(record, DataOptions(template=name))


def test_official_strings():
    messages = [
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": "<think>\nt\n</think>\nA"},
        {"role": "user", "content": "R"},
    ]
    before = "User: Q\n\nAssistant: "
    assert render(TEMPLATES["world"], messages) == before + "<think>\nt\n</think>\nA\n\nUser: R\n\nAssistant:"
    assert render(TEMPLATES["g1"], messages) == before + "A\n\nUser: R\n\nAssistant:"
    assert render(TEMPLATES["g1-think"], messages) == before + "A\n\nUser: R\n\nAssistant: <think"
    assert render(TEMPLATES["g1-think-some"], messages) == before + "A\n\nUser: R (think)\n\nAssistant: <think"
    whole = render(TEMPLATES["g1-think"], messages[:2], add_generation_prompt=False)
    assert whole == before + "A\n\n"


def test_a_template_in_jinja_stays_but_for_the_marks_of_answers():
    source = "{% for m in messages %}{%- generation -%}{{ m.content }}{% endgeneration %}{% endfor %}"
    found = as_jinja(Template(jinja=source))
    assert found == "{% for m in messages %}{{ m.content }}{% endfor %}"


def test_what_has_no_question_has_no_form():
    assert as_jinja(TEMPLATES["fim"]) is None
