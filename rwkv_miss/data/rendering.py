"""What a record looks like as text in a template, and which of it the model learns.

A prompt, which a runtime writes, and what the model writes after it are spans of their own. What carries loss is what
the model has to write: the answer, with a thought before it if it has one, and its end: the template's `end` after an
answer that another turn follows; after the last one token 0 (the end of the document, which is added when the record is
tokenised), with `answer_end` "blank_line" the template's `end` before it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import NamedTuple

from rwkv_miss.config import DataOptions
from rwkv_miss.data import jinja
from rwkv_miss.data.records import Record, Tool, Turn
from rwkv_miss.data.templates import Template, fill, find_template, recorded
from rwkv_miss.errors import UserError

_THOUGHT = re.compile(r"\s*<think>(.*?)</think>\s*", re.DOTALL)
# Stands for the answer that a prompt asks for.
_TO_COME = "..."


class Span(NamedTuple):
    """A stretch of a rendered record, and whether its tokens are learned (carry loss)."""

    text: str
    learned: bool


class _Answer(NamedTuple):
    """An assistant's turn as text: `prompt` is all before it up to the answer before, `said` what it says without its
    thought, `written` how the template writes that."""

    prompt: str
    thought: str
    written: str
    said: str
    learned: bool


def render(record: Record, options: DataOptions) -> list[Span]:
    """The record as spans; their texts joined are the whole text. Plain text is one learned span, as it is.

    Turns after the last learned answer cannot affect the loss and are left out. An answer is learned whole, whatever it
    holds: one with a stop string inside too, although a runtime would stop there (`read_records` warns of it).

    Raises:
        UserError: the template has no form for a turn of the record.
    """
    if record.is_text:
        return [Span(record.turns[0].content, True)]
    spans = []
    for answer in _answers(record, options):
        spans.append(Span(answer.prompt, False))
        if answer.thought and not (answer.learned and options.learn_thoughts):
            spans += [Span(answer.thought, False), Span(answer.written, answer.learned)]
        else:
            spans.append(Span(answer.thought + answer.written, answer.learned))
    return spans


def prompt_text(record: Record, options: DataOptions) -> str:
    """The conversation up to its last answer: the prompt to evaluate that with.

    Raises:
        UserError: the record is plain text, or as `render`.
    """
    *before, last = _answers(_refuse_text(record), options)
    return "".join(part for answer in before for part in answer[:3]) + last.prompt


def answer_text(record: Record, options: DataOptions) -> str:
    """The conversation's last answer in the form that the model learns, without its thought and without white space at
    its ends.

    Raises:
        UserError: as `prompt_text`.
    """
    return _answers(_refuse_text(record), options)[-1].said.strip()


def written_text(record: Record, options: DataOptions) -> str:
    """What the model has to write after `prompt_text`, without a thought.

    Raises:
        UserError: as `prompt_text`.
    """
    return _answers(_refuse_text(record), options)[-1].written


def without_thought(written: str, template: Template) -> str:
    """The answer in what a model wrote after a template's prompt, without white space at its ends."""
    if template.after_thought is not None:
        end = _thoughts_end(template)
        written = written.partition(end)[2] if end in written else written.strip().removeprefix(_border(template))
    return written.strip()


def chat_prompt(question: str, template: Template) -> str:
    """The prompt of a conversation's first question: `chat_spans` of it alone.

    Raises:
        UserError: the template has no form for a question.
    """
    return "".join(chat_spans([Turn("user", question)], DataOptions(template=recorded(template))))


def chat_spans(turns: Sequence[Turn], options: DataOptions, tools: Sequence[Tool] = ()) -> list[str]:
    """The texts of a conversation whose last turn waits for an answer: in turn a prompt and the answer to it, last the
    prompt of the answer to come, before a thought where the template has thoughts. As in training each is encoded by
    itself.

    Raises:
        UserError: the template has no form for a turn.
    """
    template = find_template(options.template)
    if template.jinja is not None:
        pairs, prompt = jinja.write("prompt", template.jinja, turns, tools, asks=True)
        return [*chain.from_iterable(pairs), prompt]
    to_come = Turn("assistant", _TO_COME, thought=_TO_COME if template.think_prompt is not None else "")
    *before, last = _answers(Record("prompt", (*turns, to_come), tools=tuple(tools)), options)
    return [text for answer in before for text in (answer.prompt, answer.written)] + [last.prompt]


def begun_answer(template: Template) -> str:
    """What the prompt of `chat_spans` ends in that belongs to the answer, such as ` <think`."""
    prompt = template.think_prompt or template.no_think_prompt or template.prompt
    return prompt[len(template.prompt) :] if prompt.startswith(template.prompt) else ""


def answer_turn(written: str, options: DataOptions) -> Turn | None:
    """What a model wrote after `chat_spans`, as the turn that a conversation goes on with: without a thought that the
    template writes apart from the answer. None where nothing was said, or the thought has no end."""
    template = find_template(options.template)
    if template.think_prompt is not None and _thoughts_end(template) not in written:
        return None
    turn = Turn("assistant", without_thought(written, template))
    return turn if _split("answer", turn, template)[1].strip() else None


def _border(template: Template) -> str:
    """What stands between a thought, or the prompt of a fake one, and the answer."""
    return (template.after_thought or "").partition("{content}")[0].strip()


def _thoughts_end(template: Template) -> str:
    return (template.thought or "").partition("{thought}")[2].strip() + _border(template)


def unused(record: Record, options: DataOptions) -> list[str]:
    """The names of what the record holds and its template does not write."""
    for turn in record.turns:
        if turn.calls or turn.thought or "<think>" in turn.content:
            break
    else:
        if not record.tools:
            return []
    answers = [turn for turn in record.turns if turn.role == "assistant"]
    template = find_template(options.template)
    thoughts = [_split(record.where, turn, template)[0] for turn in answers]
    there = {
        "tools": bool(record.tools),
        "tool_calls": any(turn.calls for turn in answers),
        "reasoning_content": any(thoughts),
    }
    if template.jinja is not None:
        return [name for name, is_there in there.items() if is_there and name not in template.jinja]
    written = {"tools": template.tools, "tool_calls": template.call, "reasoning_content": template.thought}
    found = [name for name, is_there in there.items() if is_there and written[name] is None]
    if template.thought is not None and any(thoughts[:-1]):
        found.append("reasoning_content of earlier answers")
    if (
        template.tools is not None
        and "{schema}" not in template.tool_line
        and any(_has_details(tool) for tool in record.tools)
    ):
        found.append("tools[].parameters, but for names and types")
    return found


def holds_stop(record: Record, options: DataOptions) -> bool:
    """Whether a learned answer of the record, in the form that the model learns, holds a string that stops it."""
    stops = find_template(options.template).stops
    if record.is_text:
        return False
    for stop in stops:
        for turn in record.turns:
            if stop in turn.content:  # a quick look first: cleaning makes no stop string
                return any(s in answer.said for answer in _answers(record, options) if answer.learned for s in stops)
    return False


def _answers(record: Record, options: DataOptions) -> list[_Answer]:
    """The record's answers up to the last learned one, each with the prompt before it."""
    template, where = find_template(options.template), record.where
    turns = _with_tools(record, template)
    by_weight = [i for i, t in enumerate(turns) if t.role == "assistant" and (t.learned or options.learn != "weighted")]
    last = by_weight[-1]
    learned = by_weight[-1:] if options.learn == "last" else by_weight
    if template.jinja is not None:
        return _by_jinja(where, turns[: last + 1], record.tools, template, learned)
    thinks = template.think_prompt is not None and bool(_split(where, turns[last], template)[0])
    question = max((i for i in range(last) if turns[i].role == "user"), default=None) if thinks else None
    found, prompt = [], ""
    for i, turn in enumerate(turns[: last + 1]):
        if turn.role == "assistant":
            found.append(_answer(where, prompt, turn, template, options, i == last, i in learned))
            prompt = ""
        elif turn.role == "prefix":
            prompt += _filled_in(where, turns, template)
        elif turn.role != "suffix":
            prompt += _asked(where, turn, template, template.question_end if i == question else "")
    return found


def _by_jinja(
    where: str, turns: Sequence[Turn], tools: Sequence[Tool], template: Template, learned: Sequence[int]
) -> list[_Answer]:
    pairs, _ = jinja.write(where, template.jinja or "", turns, tools)
    answers = [i for i, turn in enumerate(turns) if turn.role == "assistant"]
    if len(pairs) != len(answers):
        raise UserError(
            f"{where}: the template {template.name} has {len(pairs)} of {len(answers)} answers between "
            "{% generation %} and {% endgeneration %}; put what the model writes of each between them"
        )
    return [
        _Answer(prompt, "", written, turns[i].content, i in learned)
        for i, (prompt, written) in zip(answers, pairs, strict=True)
    ]


def _answer(
    where: str, before: str, turn: Turn, template: Template, options: DataOptions, is_last: bool, learned: bool
) -> _Answer:
    thought, said = _split(where, turn, template)
    if turn.calls and template.call is not None:
        calls = [fill(template.call, name=call.name, arguments=call.arguments) for call in turn.calls]
        said = "\n".join([*([said] if said else []), *calls])
    if not said.strip():
        what = "calls tools" if turn.calls else "thinks"
        raise UserError(
            f"{where}: an answer only {what}, and the template {template.name} does not write that; give another, such "
            f"as --template {'g1' if turn.calls else 'world'}, or remove the record"
        )
    if options.answer_lines == "join":
        thought, said = _clean(thought), _clean(said)
    prompt, answer = template.prompt, template.answer
    if is_last and thought and template.think_prompt is not None:
        prompt, answer = template.think_prompt, template.after_thought or ""
        thought = (template.thought or "").replace("{thought}", thought)
    else:
        thought = ""
        if is_last and template.no_think_prompt is not None:
            prompt, answer = template.no_think_prompt, template.after_thought or ""
    end = template.end if not is_last or options.answer_end == "blank_line" else ""
    return _Answer(before + prompt, thought, answer.replace("{content}", said) + end, said, learned)


def _split(where: str, turn: Turn, template: Template) -> tuple[str, str]:
    """The thought of an assistant's turn, which is empty if it has none, and what it says after that."""
    if template.keeps_thoughts or template.jinja is not None or not (found := _THOUGHT.match(turn.content)):
        return turn.thought.strip(), turn.content
    if turn.thought:
        raise UserError(f"{where}: an answer has a thought in reasoning_content and one in its content; remove one")
    return found[1].strip(), turn.content[found.end() :]


def _asked(where: str, turn: Turn, template: Template, question_end: str = "") -> str:
    """A turn that is not the assistant's, as text."""
    string = getattr(template, turn.role, None)
    if string is None:
        raise UserError(
            f"{where}: the template {template.name} has no form for a turn of role {turn.role}; give another template, "
            "or remove the record"
        )
    content, after = turn.content, ""
    if turn.input and template.input is not None:
        after = template.input.replace("{content}", _clean(turn.input) if template.cleans else turn.input)
    elif turn.input:
        content = f"{content}\n{turn.input}"
    return string.replace("{content}", (_clean(content) if template.cleans else content) + question_end) + after


def _filled_in(where: str, turns: Sequence[Turn], template: Template) -> str:
    if template.fill_in is None:
        raise UserError(
            f"{where}: the template {template.name} has no form for a text to fill in; give another, such as "
            "--template fim, or remove the record"
        )
    return fill(template.fill_in, **{turn.role: turn.content for turn in turns[:2]})


def _with_tools(record: Record, template: Template) -> tuple[Turn, ...]:
    """The record's turns, of which the first, the system's, also says which tools there are."""
    if not record.tools or template.tools is None:
        return record.turns
    content = template.tools.replace("{tools}", "\n".join(_tool_line(tool, template) for tool in record.tools))
    if record.turns[0].role != "system":
        return (Turn("system", content), *record.turns)
    return (Turn("system", f"{record.turns[0].content}\n{content}"), *record.turns[1:])


def _tool_line(tool: Tool, template: Template) -> str:
    """A tool as one line; `parameters` are its parameters with their types, such as `city: string, days: integer`."""
    properties = tool.parameters.get("properties")
    parameters = []
    for name, schema in properties.items() if isinstance(properties, Mapping) else ():
        if schema is None:  # a parameter of another tool, where a table gives all of them the same columns
            continue
        kind = schema.get("type") if isinstance(schema, Mapping) else None
        parameters.append(f"{name}: {kind}" if isinstance(kind, str) else name)
    values = {"name": tool.name, "parameters": ", ".join(parameters), "description": _clean(tool.description)}
    return fill(template.tool_line, **values, schema=json.dumps(tool.parameters, ensure_ascii=False)).rstrip()


def _has_details(tool: Tool) -> bool:
    """Whether a tool's parameters say more than their names and types."""
    properties = tool.parameters.get("properties")
    schemas = properties.values() if isinstance(properties, Mapping) else ()
    return not tool.parameters.keys() <= {"type", "properties"} or any(
        not isinstance(schema, Mapping) or not schema.keys() <= {"type"} for schema in schemas if schema is not None
    )


def _clean(content: str) -> str:
    r"""Ends stripped, `\r\n` made `\n`, and each run of two or more `\n` made one. A lone `\r` and a line of white
    space stay."""
    content = content.strip().replace("\r\n", "\n")
    while "\n\n" in content:
        content = content.replace("\n\n", "\n")
    return content


def _refuse_text(record: Record) -> Record:
    if record.is_text:
        raise UserError(f"{record.where}: plain text has no question and answer; give records that have them")
    return record
