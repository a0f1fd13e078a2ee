"""The messages of a request as the prompt of a model, by the model's own template."""

from __future__ import annotations

import re

from rwkv_miss.config import DataOptions
from rwkv_miss.data.records import Record
from rwkv_miss.data.rendering import begun_answer, chat_spans, unused
from rwkv_miss.data.templates import Template, recorded
from rwkv_miss.serving.bodies import ChatRequest
from rwkv_miss.serving.errors import ApiError


def chat_prompt(asked: ChatRequest, template: Template) -> tuple[list[str], str]:
    """The prompt of the answer that a request asks for, as texts of which each is encoded by itself; and the beginning
    of the answer that the prompt holds already, such as ` <think`.

    Raises:
        ApiError: the messages are no conversation.
        UserError: the template has no form for one of them.
    """
    for i, message in enumerate(asked.messages):
        if message.role in ("system", "developer") and i > 0:
            raise _wrong(f"messages[{i}].role", f"a {message.role} message can only be the first")
        if not message.content.strip() and not message.tool_calls:
            raise _wrong(f"messages[{i}].content", "is empty")
        if message.role != "assistant" and message.tool_calls:
            raise _wrong(f"messages[{i}].tool_calls", f"a {message.role} message calls no tools")
    if asked.messages[-1].role == "assistant":
        raise _wrong("messages", "the last one is the assistant's; end with a user's or a tool's")
    tools = tuple(tool.tool() for tool in asked.tools) if asked.tool_choice == "auto" else ()
    record = Record("messages", tuple(message.turn() for message in asked.messages), tools=tools)
    options = DataOptions(template=recorded(template))
    if "tools" in unused(record, options):
        raise _wrong("tools", f"the model's template ({template.name}) does not write them; leave them out")
    spans = chat_spans(record.turns, options, tools)
    if template.jinja is not None:
        begun = re.search(r"<think>?\s*$", spans[-1])
        return spans, begun[0] if begun else ""
    return spans, begun_answer(template)


def _wrong(param: str, message: str) -> ApiError:
    return ApiError(400, f"{param}: {message}", param)
