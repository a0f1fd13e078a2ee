"""How an object of named fields becomes a record, whatever format the object was written in."""

from __future__ import annotations

import json
import string
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from rwkv_miss.config import DataOptions
from rwkv_miss.data.records import Call, Record, Tool, Turn
from rwkv_miss.errors import UserError

_WITH_INPUT = ("instruction", "output")
KNOWN_PAIRS = (
    _WITH_INPUT,
    ("query", "response"),
    ("question", "answer"),
    ("prompt", "completion"),
)
"""The names of a prompt and its answer that are found without an option."""
_TALKS = (("messages",), ("conversations",))
_COMPARED = ("chosen", "rejected")
_FILL_IN = ("prefix", "suffix", "middle")
_SHAPES: tuple[tuple[str, ...], ...] = (("text",), *_TALKS, *KNOWN_PAIRS, _COMPARED, _FILL_IN)
# What is asked, beside a chosen and a rejected answer.
_ASKED = ("prompt", "question", "instruction")

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
}
"""Who speaks, as OpenAI's `messages` and ShareGPT's `conversations` call it -> the role of the turn."""

_ADVICE = "name yours with prompt_field and answer_field, or with text_field"
_CORRECT = "correct or remove the record"
_EMPTY: tuple[Any, ...] = (None, "", [], {})

Turns = tuple[Turn, ...]


def record_of(where: str, item: Mapping[str, Any], options: DataOptions) -> Record:
    """The record that an object's fields hold.

    With `prompt_field` and `answer_field`, or with a `text_field` other than "text", these fields are read alone.
    Otherwise the object must have exactly one of the known shapes:

    - `text`;
    - `messages` or `conversations`, a list of {role, content} or {from, value}, with `tools` and `system` beside it;
    - a pair of `KNOWN_PAIRS`, with `system` and `history` (a list of [question, answer]) beside it, and `input` beside
      `instruction`; also with the field that `choices_field` names, which may stand beside `prompt_field` as well;
    - `chosen` and `rejected`, both an answer to `prompt` (`question`, `instruction`) or a list as in `messages`;
    - `prefix`, `suffix` and `middle`.

    A field that is null counts as absent. Fields that are not read are named in the record.

    Args:
        where: the file and the line or row of the object, for messages.
        item: values as JSON has them.

    Raises:
        UserError: the object has none of these shapes or several, or a field that is read is not of its type, is empty
            or white space alone, or cannot be written as UTF-8. The message begins with `where`.
    """
    fields = {name: value for name, value in item.items() if value is not None}
    unread: dict[str, None] = {}
    tools: tuple[Tool, ...] = ()
    rejected: Turns = ()
    choices: tuple[str, ...] = ()
    if options.prompt_field is not None and options.answer_field is not None:
        names = (options.prompt_field, options.answer_field)
        choices = _choices(where, fields, options.choices_field, names[1])
        _check_there(where, fields, names, _ADVICE)
        turns = _question(where, fields, names)
    elif options.text_field != "text":
        turns = (Turn("text", _string(where, fields, options.text_field)),)
    elif (shape := _known_shape(where, fields)) == ("text",):
        turns = (Turn("text", _string(where, fields, "text")),)
    elif shape in _TALKS:
        tools = _tools(where, fields, unread)
        turns = _after_system(where, fields, _turns(where, fields, shape[0], options, unread))
        _check_answers(f"{where}: {shape[0]}", turns)
    elif shape == _COMPARED:
        turns, rejected = _compared(where, fields, options, unread)
    elif shape == _FILL_IN:
        around = tuple(Turn(name, _string(where, fields, name, may_be_empty=True)) for name in _FILL_IN[:2])
        turns = (*around, Turn("assistant", _string(where, fields, "middle")))
    else:
        about = _optional(where, fields, "input") if shape == _WITH_INPUT else ""
        choices = _choices(where, fields, options.choices_field, shape[1])
        turns = _history(where, fields) + _question(where, fields, shape, about)
        turns = _after_system(where, fields, turns)
    if fields:
        unread |= dict.fromkeys(name for name, value in fields.items() if value not in _EMPTY)
    return Record(where, turns, tuple(unread), tools, rejected, choices)


def kind(value: Any) -> str:
    """A value's JSON type, or the name of a Python type that JSON does not have, for messages."""
    known = {
        dict: "an object",
        list: "a list",
        str: "a string",
        bool: "a truth value",
        int: "a number",
        float: "a number",
        type(None): "null",
    }
    return known.get(type(value), f"a {type(value).__name__}")


def _known_shape(where: str, fields: dict[str, Any]) -> tuple[str, ...]:
    fitting = _fitting(tuple(fields))
    if not fitting:
        raise UserError(
            f"{where}: no known field ({', '.join('/'.join(shape) for shape in _SHAPES)}); {_found(fields)}; {_ADVICE}"
        )
    if len(fitting) > 1:
        raise UserError(
            f"{where}: the fields fit more than one form: {' and '.join('/'.join(shape) for shape in fitting)}; "
            "choose with prompt_field and answer_field, or remove the fields you do not mean"
        )
    return fitting[0]


@lru_cache(maxsize=256)  # most files have a few sets of fields
def _fitting(names: tuple[str, ...]) -> list[tuple[str, ...]]:
    """The shapes that fields of these names have."""
    return [shape for shape in _SHAPES if set(shape) <= set(names)]


# Each of these takes the fields that it reads out of `fields`: what is left at the end was not read.


def _question(where: str, fields: dict[str, Any], names: tuple[str, ...], about: str = "") -> Turns:
    asked, answered = names
    return (
        Turn("user", _string(where, fields, asked), about),
        Turn("assistant", _string(where, fields, answered)),
    )


def _choices(where: str, fields: dict[str, Any], name: str | None, answer: str) -> tuple[str, ...]:
    """The choices in the field `name`, if it is there. The answer becomes the text of the one that it means.

    The field is a list of texts, or has such a list as `text` and another, of what the answer calls them, as `label`.
    """
    if name is None or name not in fields:
        return ()
    value = fields.pop(name)
    texts, labels = (value.get("text"), value.get("label")) if isinstance(value, dict) else (value, None)
    if not isinstance(texts, list) or len(texts) < 2:
        raise UserError(f"{where}: {name} is {kind(value)}; give a list of at least two texts")
    texts = [_string(where, {f"{name}[{i}]": text}, f"{name}[{i}]") for i, text in enumerate(texts)]
    if labels is None:
        labels = list(string.ascii_uppercase[: len(texts)])
    elif not isinstance(labels, list) or len(labels) != len(texts):
        raise UserError(f"{where}: the labels in {name} are not as many as its {len(texts)} texts; {_CORRECT}")
    _check_there(where, fields, (answer,), _ADVICE)
    fields[answer] = texts[_chosen(where, fields[answer], texts, labels)]
    return tuple(texts)


def _chosen(where: str, answer: Any, texts: Sequence[str], labels: Sequence[Any]) -> int:
    """The index of the choice that an answer means by its text, its label or its number, which may be a string."""
    if type(answer) is int and 0 <= answer < len(texts):
        return answer
    for names in (texts, labels, [*map(str, range(len(texts)))]):
        if isinstance(answer, str) and answer in names:
            return names.index(answer)
    raise UserError(
        f"{where}: the answer {answer!r:.40} is none of the {len(texts)} choices; give its text, its label (such as "
        f"{labels[0]}) or its number, from 0 on"
    )


def _after_system(where: str, fields: dict[str, Any], turns: Turns) -> Turns:
    """The turns, after what the field `system` says if there is one."""
    content = _optional(where, fields, "system")
    if content and turns and turns[0].role == "system":
        raise UserError(f"{where}: has a field 'system' and a system turn; remove one of them")
    return (Turn("system", content), *turns) if content else turns


def _history(where: str, fields: dict[str, Any]) -> Turns:
    """The questions and answers that came before, each as a list of two strings."""
    if "history" not in fields:
        return ()
    turns: Turns = ()
    history = fields.pop("history")
    if not isinstance(history, list):
        raise UserError(f"{where}: history is {kind(history)}, not a list of [question, answer]; {_CORRECT}")
    for i, pair in enumerate(history):
        at = f"{where}: history[{i}]"
        if not isinstance(pair, list) or len(pair) != 2:
            raise UserError(f"{at} is {kind(pair)}, not [question, answer]; {_CORRECT}")
        said = dict(zip(("question", "answer"), pair, strict=True))
        turns += (Turn("user", _string(at, said, "question")), Turn("assistant", _string(at, said, "answer")))
    return turns


def _compared(where: str, fields: dict[str, Any], options: DataOptions, unread: dict[str, None]) -> tuple[Turns, Turns]:
    """The conversation with the chosen answer, and with the rejected one."""
    asked: Turns = ()
    if name := next((name for name in _ASKED if name in fields), None):
        is_list = isinstance(fields[name], list)
        asked = (
            _turns(where, fields, name, options, unread) if is_list else (Turn("user", _string(where, fields, name)),)
        )
    asked = _after_system(where, fields, asked)
    found = []
    for name in _COMPARED:
        if isinstance(fields[name], list):
            turns = _turns(where, fields, name, options, unread)
            if turns and turns[0].role == "assistant":
                turns = asked + turns
            elif turns[: len(asked)] != asked:
                raise UserError(f"{where}: {name} is a conversation that does not begin with what is asked; {_CORRECT}")
        else:
            turns = (*asked, Turn("assistant", _string(where, fields, name)))
        _check_answers(f"{where}: {name}", turns)
        if turns[-1].role != "assistant" or turns[0].role == "assistant":
            raise UserError(f"{where}: {name} is no answer to a question; give one, and the question as prompt")
        found.append(turns)
    return found[0], found[1]


def _turns(where: str, fields: dict[str, Any], name: str, options: DataOptions, unread: dict[str, None]) -> Turns:
    """The turns of the list of messages in the field `name`; what is not read of them is added to `unread`."""
    messages = fields.pop(name)
    if not isinstance(messages, list):
        raise UserError(f"{where}: {name} is {kind(messages)}, not a list of {{role, content}} objects")
    turns = []
    for i, message in enumerate(messages):
        at = f"{where}: {name}[{i}]"
        if not isinstance(message, dict):
            raise UserError(f"{at} is {kind(message)}, not an object with role and content")
        left = dict(message)
        turn = _turn(at, left, options)
        if turn.role == "system" and i > 0:
            raise UserError(f"{at}: a system turn can only be the first; move it or make it a user turn")
        turns.append(turn)
        unread |= dict.fromkeys(f"{name}[].{key}" for key, value in left.items() if value not in _EMPTY)
    return tuple(turns)


def _turn(at: str, message: dict[str, Any], options: DataOptions) -> Turn:
    is_sharegpt = message.get("role") is None and message.get("from") is not None
    by, said = ("from", "value") if is_sharegpt else ("role", "content")
    needed = (by,) if message.get("tool_calls") else (by, said)
    _check_there(at, message, needed, "each message needs a role and a content")
    speaker = _string(at, message, by)
    role = ROLES.get(speaker)
    if role is None:
        raise UserError(f"{at}: {by} {speaker!r} is not known; use {', '.join(ROLES)}")
    if role != "assistant":
        return Turn(role, _content(at, message, said))
    calls = _calls(at, message)
    if calls and message.get(said) in (None, "", []):
        message.pop(said, None)
        content = ""
    else:
        content = _content(at, message, said)
        if speaker == "function_call":
            calls, content = (_call(f"{at}: {said}", _json(at, said, content)),), ""
    thought = _optional(at, message, "reasoning_content")
    learned = True
    if options.learn == "weighted" and (weight := message.pop("weight", None)) is not None:
        if weight not in (0, 1):
            raise UserError(f"{at}: weight is {weight!r:.40}; an answer is learned (1) or not (0)")
        learned = bool(weight)
    return Turn(role, content, thought=thought, calls=calls, learned=learned)


def _content(at: str, message: dict[str, Any], name: str) -> str:
    """The text of a message, which may be in parts."""
    _check_there(at, message, (name,), "each message needs a role and a content")
    if isinstance(parts := message[name], list):
        for i, part in enumerate(parts):
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                what = f"of type {part['type']!r:.40}" if isinstance(part, dict) and "type" in part else kind(part)
                raise UserError(f"{at}: {name}[{i}] is {what}; only text can be learned; remove the record")
        message[name] = "".join(part["text"] for part in parts)
    return _string(at, message, name)


def _calls(at: str, message: dict[str, Any]) -> tuple[Call, ...]:
    """The calls of a message, in which what is not read of them is left."""
    calls = message.pop("tool_calls", None) or []
    if not isinstance(calls, list):
        raise UserError(f"{at}: tool_calls is {kind(calls)}, not a list; {_CORRECT}")
    read = ("function", "type", "name", "arguments")
    for call in calls:
        if isinstance(call, dict):
            message |= {f"tool_calls[].{key}": value for key, value in call.items() if key not in read}
    return tuple(_call(f"{at}: tool_calls[{i}]", call) for i, call in enumerate(calls))


def _call(at: str, call: Any) -> Call:
    """A call as {name, arguments}, or within {function: ...}. The arguments are an object, or one as a string."""
    function = call.get("function") or call if isinstance(call, dict) else call
    if not isinstance(function, dict):
        raise UserError(f"{at} is {kind(function)}, not an object with name and arguments; {_CORRECT}")
    _check_there(at, function, ("name",), _CORRECT)
    name, arguments = _string(at, dict(function), "name"), function.get("arguments") or {}
    text = arguments if isinstance(arguments, str) else _as_json(at, "arguments", arguments)
    arguments = _json(at, "arguments", text)
    if not isinstance(arguments, dict):
        raise UserError(f"{at}: arguments is {kind(arguments)}, not an object; {_CORRECT}")
    return Call(name, _string(at, {"arguments": text}, "arguments"))


def _tools(where: str, fields: dict[str, Any], unread: dict[str, None]) -> tuple[Tool, ...]:
    """The tools in the field `tools`: a list of {name, description, parameters}, or of {function: ...}, or one as a
    string."""
    tools = fields.pop("tools", None) or []
    if isinstance(tools, str):
        tools = _json(where, "tools", tools)
    if not isinstance(tools, list):
        raise UserError(f"{where}: tools is {kind(tools)}, not a list; {_CORRECT}")
    found = []
    for i, tool in enumerate(tools):
        at = f"{where}: tools[{i}]"
        function = tool.get("function") or tool if isinstance(tool, dict) else tool
        if not isinstance(function, dict):
            raise UserError(f"{at} is {kind(function)}, not an object with a name; {_CORRECT}")
        left = dict(function)
        _check_there(at, left, ("name",), _CORRECT)
        name, description = _string(at, left, "name"), _optional(at, left, "description")
        parameters = left.pop("parameters", None) or {}
        if not isinstance(parameters, dict):
            raise UserError(f"{at}: parameters is {kind(parameters)}, not an object; {_CORRECT}")
        _string(at, {"parameters": _as_json(at, "parameters", parameters)}, "parameters")
        unread |= dict.fromkeys(f"tools[].{key}" for key in left if key != "type" and left[key] not in _EMPTY)
        found.append(Tool(name, description, parameters))
    return tuple(found)


def _check_answers(at: str, turns: Turns) -> None:
    if not any(turn.role == "assistant" for turn in turns):
        raise UserError(f"{at} has no assistant turn, so there is no answer to learn")
    if not any(turn.learned for turn in turns if turn.role == "assistant"):
        raise UserError(
            f"{at} gives every answer the weight 0, so there is none to learn; give --learn all, or remove it"
        )


def _json(at: str, name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # also a number of too many digits, and nesting too deep
        raise UserError(f"{at}: {name} is not JSON ({error}); {_CORRECT}") from error


def _as_json(at: str, name: str, value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{at}: {name} cannot be written as JSON ({error}); {_CORRECT}") from error


def _check_there(at: str, fields: dict[str, Any], names: tuple[str, ...], advice: str) -> None:
    for name in names:
        if name not in fields:
            raise UserError(f"{at}: lacks the field {name!r}; {_found(fields)}; {advice}")


def _optional(at: str, fields: dict[str, Any], name: str) -> str:
    """The field's string; empty if it is not there, or holds nothing."""
    if name not in fields:
        return ""
    value = fields[name]
    if value in _EMPTY or (isinstance(value, str) and not value.strip()):
        fields.pop(name, None)
        return ""
    return _string(at, fields, name)


def _string(where: str, fields: dict[str, Any], name: str, may_be_empty: bool = False) -> str:
    """The field's value: a string that is there, holds more than white space, and can be written as UTF-8."""
    if name not in fields:
        _check_there(where, fields, (name,), _ADVICE)
    value = fields.pop(name)
    if not isinstance(value, str):
        raise UserError(f"{where}: field {name!r} is {kind(value)}, not a string; {_CORRECT}")
    if (not value or value.isspace()) and not may_be_empty:
        raise UserError(f"{where}: field {name!r} is empty; fill it or remove the record")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            bad = value[error.start]
            raise UserError(f"{where}: field {name!r} holds {bad!r}, half of a surrogate pair; remove it") from error
    return value


def _found(fields: dict[str, Any]) -> str:
    return f"found {', '.join(map(repr, fields))}" if fields else "found no field that is not null"
