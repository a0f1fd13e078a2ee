r"""Templates: how the turns of a record are written as text. Each is data: an entry of `TEMPLATES`, or a user's file.

World and G1 models were trained on

    System: {s}\n\nUser: {q}\n\nAssistant: {a}\n\nUser: {q}\n\nAssistant: {a}

so a runtime's prompt ends in `Assistant:`, and what the model has to write is ` {a}` with its leading space. What the
system and the user say is cleaned, since a blank line ends a turn. The strings of G1 are those of BlinkDL/RWKV-LM,
RWKV-v7/RWKV7-G1x-templates.txt; the one to fill in the middle is rwkv_lightning's.
"""

from __future__ import annotations

import json
import logging
import re
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from rwkv_miss.config import DataOptions
from rwkv_miss.data import jinja
from rwkv_miss.errors import UserError
from rwkv_miss.files import check_is_file, read_yaml

_log = logging.getLogger("rwkv_miss")
_O = TypeVar("_O", bound=DataOptions)


@dataclass(frozen=True, kw_only=True)
class Template:
    """How turns are written. In a string, names in braces stand for what is put in: `User: {content}`. A turn for which
    the template has no string is refused.

    name: for messages.
    system, user, tool: such turns; {content} is what is said. tool: what a call returned.
    input: what an instruction is about, after the user's turn; without it that follows the instruction on a new line.
    tools: the content of a system turn that says which tools there are, {tools}, one a line as in `tool`.
    tool_line: one of them; {name}, {parameters} (names and types), {schema} (the same as a JSON schema), {description}.
    call: a call of a tool, as the end of an answer; {name} and {arguments}.
    fill_in: the prompt of a text to fill in; {prefix} and {suffix}.
    prompt: what a runtime writes before an answer.
    answer: what the model then writes; {content}.
    think_prompt: as `prompt`, before an answer with a thought; thought: the {thought} that the model writes then;
    after_thought: its answer after that; {content}. Only a last answer has a thought, those before are written without.
    no_think_prompt: as `prompt`, before a last answer without a thought, which is written as by `after_thought`.
    question_end: what ends the question of an answer with a thought, to say how long it is to be.
    keeps_thoughts: a thought at the beginning of an answer, between <think> and </think>, is a part of the answer.
    end: what follows an answer if another turn follows it.
    cleans: what the user, the system and tools say is stripped, and its line breaks joined, so that no blank line ends
        a turn.
    stops: strings at which a runtime ends an answer. Token 0 ends it with every template.
    jinja: a template in the language Jinja, as Hugging Face's tokenizers have one, in place of all strings above.
    """

    name: str = "your own"
    system: str | None = None
    user: str | None = None
    input: str | None = None
    tool: str | None = None
    tools: str | None = None
    tool_line: str = "- {name}({parameters}) {description}"
    call: str | None = None
    fill_in: str | None = None
    prompt: str = ""
    answer: str = "{content}"
    think_prompt: str | None = None
    thought: str | None = None
    after_thought: str | None = None
    no_think_prompt: str | None = None
    question_end: str = ""
    keeps_thoughts: bool = False
    end: str = ""
    cleans: bool = True
    stops: tuple[str, ...] = ()
    jinja: str | None = None


_WORLD = Template(
    name="world",
    system="System: {content}\n\n",
    user="User: {content}\n\n",
    prompt="Assistant:",
    answer=" {content}",
    keeps_thoughts=True,
    end="\n\n",
    stops=("\n\nUser:",),
)
_G1 = replace(
    _WORLD,
    name="g1",
    keeps_thoughts=False,
    tools="Tools:\n{tools}\nReturn only a JSON function call.",
    call='```json\n{"name": "{name}", "arguments": {arguments}}\n```',
    tool="User: Function output:\n{content}\n\n",
)
_G1_FAKE_THINK = replace(
    _G1, name="g1-fake-think", no_think_prompt="Assistant: <think>\n</think", after_thought=">\n{content}"
)
_G1_THINK = replace(_G1_FAKE_THINK, name="g1-think", think_prompt="Assistant: <think", thought=">\n{thought}\n</think")
TEMPLATES = {
    template.name: template
    for template in (
        _WORLD,
        _G1,
        _G1_THINK,
        replace(_G1_THINK, name="g1-think-some", question_end=" (think)"),
        replace(_G1_THINK, name="g1-think-a-bit", question_end=" (think a bit)"),
        replace(_G1_THINK, name="g1-think-a-lot", question_end=" (think a lot)"),
        _G1_FAKE_THINK,
        replace(_G1_FAKE_THINK, name="g1-fake-think-short", no_think_prompt="Assistant: <think></think"),
        Template(
            name="instruction",
            user="Instruction: {content}\n\n",
            input="Input: {content}\n\n",
            prompt="Response:",
            answer=" {content}",
            end="\n\n",
            stops=("\n\nInstruction:",),
        ),
        Template(name="fim", fill_in="✿prefix✿✿suffix✿{suffix}✿middle✿{prefix}", cleans=False, stops=("✿",)),
        Template(name="none", user="{content}", keeps_thoughts=True, cleans=False),
    )
}
"""The templates by their names. To add one: one entry here, or a file of the same fields."""

_BEFORE = {"rwkv-world": "world"}
"""What adapters of earlier versions call a template."""
_STANDS_FOR = {
    **dict.fromkeys(("system", "user", "input", "tool", "answer", "after_thought"), ("content",)),
    "tools": ("tools",),
    "tool_line": ("name",),
    "call": ("name", "arguments"),
    "fill_in": ("prefix", "suffix"),
    "thought": ("thought",),
}
"""What has to stand in braces in a template's string."""


def find_template(given: str | None) -> Template:
    """The template of a name, a file or a text that `recorded` made; World's without one.

    Raises:
        UserError: there is none of that name, or the file cannot be read or is no template.
    """
    if given is None:
        return _WORLD
    if given in TEMPLATES:
        return TEMPLATES[given]
    return _from_text(given if given.startswith("{") else _file_text(given))


def settled(options: _O, adapters: str | None = None) -> _O:
    """The options with a template that no file has to be read for: the one given, or else the one of an adapter.

    Args:
        adapters: what is recorded with the adapter that is used, if one is. No file is read for it.

    Raises:
        UserError: as `find_template`, or an option that the template has no use for.
    """
    theirs = _BEFORE.get(str(adapters), adapters)
    given = options.template
    if given is None and theirs is not None:
        if theirs not in TEMPLATES and not theirs.startswith("{"):
            raise UserError(f"the adapter was trained with a template {theirs!r:.40}, unknown here; give --template")
        given = theirs
    template = find_template(given)
    ours = recorded(template)
    if theirs not in (None, ours):
        names = [text if text in TEMPLATES else "one of its own" for text in (ours, str(theirs))]
        _log.warning("template is %s, but the adapter was trained with %s", *names)
    if template.jinja is not None and (options.answer_lines, options.answer_end) != ("keep", "token"):
        raise UserError("answer_lines and answer_end are given, but a template in Jinja decides that; leave them out")
    return replace(options, template=ours)


def recorded(template: Template) -> str:
    """The template as text, from which `find_template` makes it again: its name if the table has it."""
    if TEMPLATES.get(template.name) == template:
        return template.name
    return json.dumps({f.name: value for f in fields(template) if (value := getattr(template, f.name)) != f.default})


def fill(string: str, **values: str) -> str:
    """The string with the values in the places of their names in braces; other braces stay, also those of values."""
    return re.sub(r"\{(\w+)\}", lambda found: values.get(found[1], found[0]), string)


def _file_text(given: str) -> str:
    path = Path(given)
    if path.suffix.lower() not in (".yaml", ".yml", ".jinja"):
        raise UserError(
            f"there is no template {given!r}; there are {', '.join(TEMPLATES)}, and files .yaml and .jinja of your own"
        )
    check_is_file(path, "template")
    if path.suffix.lower() != ".jinja":
        content = read_yaml(path)
        return recorded(_checked({"name": path.name, **content} if isinstance(content, dict) else content, given))
    try:
        return recorded(_checked({"name": path.name, "jinja": path.read_text(encoding="utf-8")}, given))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error


@lru_cache(maxsize=8)
def _from_text(text: str) -> Template:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"the template {text[:40]!r} is no name, file or JSON ({error})") from None
    return _checked(content, "template")


def _checked(content: Any, where: str) -> Template:
    """A template of a file's fields. Raises UserError with all that is wrong with them."""
    if not isinstance(content, dict):
        raise UserError(f"{where}: is no template; give its fields, such as user: 'User: {{content}}'")
    kinds = {f.name: str(f.type) for f in fields(Template)}
    found = []
    for name, value in content.items():
        if (kind := kinds.get(str(name))) is None:
            found.append(f"there is no field {name!r}; there are {', '.join(kinds)}")
        elif kind == "bool":
            found += [] if isinstance(value, bool) else [f"{name} is {value!r:.40}; it must be true or false"]
        elif kind.startswith("tuple"):
            is_list = isinstance(value, (list, tuple)) and all(isinstance(stop, str) and stop for stop in value)
            found += [] if is_list else [f"{name} is {value!r:.40}; it must be a list of strings"]
        elif value is None and "None" in kind:
            continue
        elif not isinstance(value, str):
            found.append(f"{name} is {value!r:.40}; it must be a string")
        elif missing := [part for part in _STANDS_FOR.get(name, ()) if f"{{{part}}}" not in value]:
            found.append(f"{name} is {value!r:.40}, without {{{missing[0]}}}")
    thinks = [name for name in ("think_prompt", "thought", "after_thought") if content.get(name)]
    if "think_prompt" in thinks or "thought" in thinks:
        lacking = {"think_prompt", "thought", "after_thought"}.difference(thinks)
        found += [f"{name} is missing, for thoughts" for name in sorted(lacking)]
    if content.get("no_think_prompt") and not content.get("after_thought"):
        found.append("after_thought is missing, for what follows no_think_prompt")
    if content.get("jinja") is None and not (content.get("user") or content.get("fill_in")):
        found.append("neither user, fill_in nor jinja is given, so that it has no form for a question")
    if found:
        raise UserError(f"{where}: {'; '.join(found)}")
    if content.get("jinja") is not None:
        jinja.compiled(content["jinja"])
    return Template(**content | {"stops": tuple(content.get("stops", ()))})
