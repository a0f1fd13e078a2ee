"""How an object of named fields becomes a record, whatever format the object was written in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rwkv_miss.config import DataOptions
from rwkv_miss.data.records import Record, Turn
from rwkv_miss.errors import UserError

_WITH_INPUT = ("instruction", "output")
KNOWN_PAIRS = (
    _WITH_INPUT,
    ("query", "response"),
    ("question", "answer"),
    ("prompt", "completion"),
)
"""The names of a prompt and its answer that are found without an option."""

_ADVICE = "name yours with prompt_field and answer_field, or with text_field"
_EMPTY: tuple[Any, ...] = (None, "", [], {})

Turns = tuple[Turn, ...]
ROLES = ("system", "user", "assistant")


def record_of(where: str, item: Mapping[str, Any], options: DataOptions) -> Record:
    """The record that an object's fields hold.

    With `prompt_field` and `answer_field`, or with a `text_field` other than "text", these fields are read.
    Otherwise the object must have exactly one of the known shapes: `text`; `messages` (a list of {"role",
    "content"}); a pair of `KNOWN_PAIRS` (`input`, if the object has one that is not empty, follows `instruction` on
    a new line). A field that is null counts as absent. Fields that are not read are named in the record.

    Args:
        where: the file and the line or row of the object, for messages.
        item: values as JSON has them.

    Raises:
        UserError: the object has none of these shapes or several, or a field that is read is not a string, is empty
            or white space alone, or cannot be written as UTF-8. The message begins with `where`.
    """
    fields = {name: value for name, value in item.items() if value is not None}
    shape: tuple[str, ...]
    if options.prompt_field is not None and options.answer_field is not None:
        is_named, shape = True, (options.prompt_field, options.answer_field)
    elif options.text_field != "text":
        is_named, shape = True, (options.text_field,)
    else:
        is_named, shape = False, _known_shape(where, fields)

    read = set(shape)
    unread: dict[str, None] = {}
    turns: Turns
    if shape == ("messages",) and not is_named:
        turns = _messages(where, fields["messages"], unread)
    elif len(shape) == 1:
        turns = (Turn("text", _string(where, fields, shape[0])),)
    else:
        prompt, answer = (_string(where, fields, name) for name in shape)
        if shape == _WITH_INPUT and not is_named:
            read.add("input")
            if fields.get("input", "") != "":
                prompt = f"{prompt}\n{_string(where, fields, 'input')}"
        turns = (Turn("user", prompt), Turn("assistant", answer))
    unread |= dict.fromkeys(name for name, value in fields.items() if name not in read and value not in _EMPTY)
    return Record(where, turns, tuple(unread))


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
    shapes: list[tuple[str, ...]] = [("text",), ("messages",), *KNOWN_PAIRS]
    fitting = [shape for shape in shapes if all(name in fields for name in shape)]
    if not fitting:
        raise UserError(
            f"{where}: no known field (text, messages, {', '.join('/'.join(pair) for pair in KNOWN_PAIRS)}); "
            f"{_found(fields)}; {_ADVICE}"
        )
    if len(fitting) > 1:
        raise UserError(
            f"{where}: the fields fit more than one form: {' and '.join('/'.join(shape) for shape in fitting)}; "
            "choose with prompt_field and answer_field, or remove the fields you do not mean"
        )
    return fitting[0]


def _messages(where: str, messages: Any, unread: dict[str, None]) -> Turns:
    """The turns of a list of messages; the names of fields that are not read are added to `unread`."""
    if not isinstance(messages, list):
        raise UserError(f"{where}: messages is {kind(messages)}, not a list of {{role, content}} objects")
    advice = "each message needs a role and a content"
    turns = []
    for i, message in enumerate(messages):
        at = f"{where}: messages[{i}]"
        if not isinstance(message, dict):
            raise UserError(f"{at} is {kind(message)}, not an object with role and content")
        role = _string(at, message, "role", advice)
        if role not in ROLES:
            raise UserError(f"{at}: role {role!r} is not known; use {', '.join(ROLES)}")
        if role == "system" and i > 0:
            raise UserError(f"{at}: a system turn can only be the first; move it or make it a user turn")
        turns.append(Turn(role, _string(at, message, "content", advice)))
        for name, value in message.items():
            if name not in ("role", "content") and value not in _EMPTY:
                unread[f"messages[].{name}"] = None
    if not any(turn.role == "assistant" for turn in turns):
        raise UserError(f"{where}: messages has no assistant turn, so there is no answer to learn")
    return tuple(turns)


def _string(where: str, fields: dict[str, Any], name: str, advice: str = _ADVICE) -> str:
    """The field's value: a string that is there, holds more than white space, and can be written as UTF-8."""
    if name not in fields:
        raise UserError(f"{where}: lacks the field {name!r}; {_found(fields)}; {advice}")
    value = fields[name]
    if not isinstance(value, str):
        raise UserError(f"{where}: field {name!r} is {kind(value)}, not a string; correct or remove the record")
    if not value.strip():
        raise UserError(f"{where}: field {name!r} is empty; fill it or remove the record")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        bad = value[error.start]
        raise UserError(f"{where}: field {name!r} holds {bad!r}, half of a surrogate pair; remove it") from error
    return value


def _found(fields: dict[str, Any]) -> str:
    return f"found {', '.join(map(repr, fields))}" if fields else "found no field that is not null"
