"""Templates in Jinja, as Hugging Face's tokenizers have them, run in Jinja's sandbox.

They see what transformers shows them: `messages` (role, content and, where a turn has them, reasoning_content and
tool_calls), `tools`, `add_generation_prompt`, `raise_exception`. What the model writes stands between
{% generation %} and {% endgeneration %}, as transformers has it for masks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from rwkv_miss.data.records import Tool, Turn
from rwkv_miss.errors import UserError

# Unicode keeps these two for a program's own use: no text has them.
_BEGIN, _END = "\ufdd0", "\ufdd1"


class _Generation(jinja2.ext.Extension):
    """Puts what is between the tags between `_BEGIN` and `_END`."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Callable[[], str]) -> str:
        return f"{_BEGIN}{caller()}{_END}"


@lru_cache(maxsize=8)
def compiled(source: str) -> jinja2.Template:
    """The template of a text. Raises UserError if it is none."""
    env = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    env.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    env.globals["raise_exception"] = _raise
    try:
        return env.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"the template is not Jinja (line {error.lineno}: {error.message})") from None


def write(
    where: str, source: str, turns: Sequence[Turn], tools: Sequence[Tool], asks: bool = False
) -> tuple[list[tuple[str, str]], str]:
    """The turns as text: ([(the prompt, what the model writes after it), ...], what follows).

    Args:
        where: the record, for messages.
        asks: end in the prompt of an answer (`add_generation_prompt`).

    Raises:
        UserError: the template cannot write these turns.
    """
    values = {"messages": [_message(turn) for turn in turns], "add_generation_prompt": asks}
    values["tools"] = [{"type": "function", "function": _function(tool)} for tool in tools] or None
    try:
        text = compiled(source).render(values)
        text.encode("utf-8")  # an escape in a call's arguments may have become half of a surrogate pair
    except UserError:
        raise
    except Exception as error:  # whatever the expressions of the template raise
        raise UserError(f"{where}: the template cannot write this record: {error}") from error
    *pairs, rest = re.split(f"{_BEGIN}(.*?){_END}", text, flags=re.DOTALL)
    return list(zip(pairs[::2], pairs[1::2], strict=True)), rest


def _message(turn: Turn) -> dict[str, Any]:
    message: dict[str, Any] = {"role": turn.role, "content": turn.content}
    if turn.input:
        message["content"] = f"{turn.content}\n{turn.input}"
    if turn.thought:
        message["reasoning_content"] = turn.thought
    if turn.calls:
        calls = [{"name": call.name, "arguments": json.loads(call.arguments)} for call in turn.calls]
        message["tool_calls"] = [{"type": "function", "function": call} for call in calls]
    return message


def _function(tool: Tool) -> dict[str, Any]:
    return {"name": tool.name, "description": tool.description, "parameters": dict(tool.parameters)}


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)
