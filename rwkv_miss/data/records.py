"""Training records as they stand in the user's files: `.jsonl` (one JSON object a line) and `.txt`."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from rwkv_miss.errors import UserError

ROLES = ("system", "user", "assistant")

KNOWN_PAIRS = (
    ("instruction", "output"),
    ("query", "response"),
    ("question", "answer"),
    ("prompt", "completion"),
)


_OPTIONS = "name yours with prompt_field and answer_field, or with text_field"


@dataclass(frozen=True, slots=True)
class Record:
    """One record: `where` it came from (`path:line`) and its turns, (role, content) each, contents as written.

    A conversation has the roles system (first only), user and assistant, with at least one assistant turn;
    plain text is the single turn ("text", content).
    """

    where: str
    turns: tuple[tuple[str, str], ...]

    @property
    def is_text(self) -> bool:
        return self.turns[0][0] == "text"


def read_records(
    path: str | Path,
    *,
    prompt_field: str | None = None,
    answer_field: str | None = None,
    text_field: str = "text",
    separator: str | None = None,
) -> Iterator[Record]:
    """Yields the records of a `.jsonl` or `.txt` file, in the file's order.

    jsonl: with `prompt_field` and `answer_field`, or with a `text_field` other than "text", only these fields
    are read. Otherwise each record must have exactly one of the known shapes: `text`; `messages` (a list of
    {"role", "content"}); a pair of `KNOWN_PAIRS` (`input`, where there is one and it is not empty, follows
    `instruction` on a new line). A field that is null counts as absent; blank lines are skipped.
    txt: the whole file is one document, or several parted by `separator` (pieces of white space only are
    skipped). CRLF is read as LF.

    Raises UserError, naming file and line, for whatever cannot be read as such a record.
    """
    path = Path(path)
    own_text = text_field != "text"
    if (prompt_field is None) != (answer_field is None):
        raise UserError("prompt_field and answer_field go together: give both, or neither")
    if prompt_field is not None and own_text:
        raise UserError("text_field cannot be combined with prompt_field and answer_field: give one kind")
    if path.is_dir():
        raise UserError(f"{path}: is a directory; give a .jsonl or .txt file, or a binidx")
    if path.suffix not in (".jsonl", ".txt"):
        raise UserError(f"{path}: suffix {path.suffix!r} is not known; give a .jsonl or .txt file, or a binidx")
    if path.suffix == ".jsonl" and separator is not None:
        raise UserError(f"{path}: separator parts the documents of a .txt file; leave it out for .jsonl")
    if path.suffix == ".txt" and (prompt_field is not None or own_text):
        raise UserError(f"{path}: a .txt file has no fields; leave out prompt_field, answer_field and text_field")
    if separator == "":
        raise UserError("separator is empty; leave it out to read the whole file as one document")

    empty = True
    try:
        with path.open("rb") as file:
            records = (
                _read_txt(path, file, separator)
                if path.suffix == ".txt"
                else _read_jsonl(path, file, prompt_field, answer_field, text_field)
            )
            for record in records:
                empty = False
                yield record
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    if empty:
        raise UserError(f"{path}: is empty: there is no record in it")


def _read_txt(path: Path, file: BinaryIO, separator: str | None) -> Iterator[Record]:
    data = file.read().removeprefix(codecs.BOM_UTF8)
    try:
        text = data.decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: is not UTF-8 ({error.reason}); convert the file to UTF-8") from error
    line = 1
    for piece in [text] if separator is None else text.split(separator):
        if piece.strip():
            yield Record(f"{path}:{line}", (("text", piece),))
        line += piece.count("\n") + (separator or "").count("\n")


def _read_jsonl(
    path: Path, file: BinaryIO, prompt_field: str | None, answer_field: str | None, text_field: str
) -> Iterator[Record]:
    for number, raw in enumerate(file, start=1):
        where = f"{path}:{number}"
        if number == 1:
            raw = raw.removeprefix(codecs.BOM_UTF8)
        if not raw.strip():
            continue
        try:
            item = json.loads(raw.rstrip(b"\r\n").decode("utf-8"))
        except UnicodeDecodeError as error:
            raise UserError(f"{where}: is not UTF-8 ({error.reason}); convert the file to UTF-8") from error
        except json.JSONDecodeError as error:
            message = f"{where}: is not JSON ({error.msg} at column {error.colno}); give one object a line"
            raise UserError(message) from error
        except (ValueError, RecursionError) as error:  # a number of too many digits, nesting too deep
            raise UserError(f"{where}: cannot be read as JSON ({error})") from error
        if not isinstance(item, dict):
            raise UserError(f"{where}: is {_kind(item)}, not an object; give one object a line")
        fields = {name: value for name, value in item.items() if value is not None}

        if prompt_field is not None and answer_field is not None:
            turns = _pair(where, fields, prompt_field, answer_field)
        elif text_field != "text":
            turns = (("text", _string(where, fields, text_field)),)
        else:
            turns = _known_shape(where, fields)
        yield Record(where, turns)


def _known_shape(where: str, fields: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    shapes: list[tuple[str, ...]] = [("text",), ("messages",), *KNOWN_PAIRS]
    fitting = [shape for shape in shapes if all(name in fields for name in shape)]
    if not fitting:
        raise UserError(
            f"{where}: no known field (text, messages, {', '.join('/'.join(pair) for pair in KNOWN_PAIRS)}); "
            f"{_found(fields)}; {_OPTIONS}"
        )
    if len(fitting) > 1:
        raise UserError(
            f"{where}: more than one reading: {' and '.join('/'.join(shape) for shape in fitting)}; "
            "choose with prompt_field and answer_field, or remove the fields you do not mean"
        )
    shape = fitting[0]
    if shape == ("text",):
        return (("text", _string(where, fields, "text")),)
    if shape == ("messages",):
        return _messages(where, fields["messages"])
    turns = _pair(where, fields, *shape)
    if shape[0] == "instruction" and fields.get("input", "") != "":
        turns = (("user", f"{turns[0][1]}\n{_string(where, fields, 'input')}"), turns[1])
    return turns


def _pair(where: str, fields: dict[str, Any], prompt: str, answer: str) -> tuple[tuple[str, str], ...]:
    return (("user", _string(where, fields, prompt)), ("assistant", _string(where, fields, answer)))


def _messages(where: str, messages: Any) -> tuple[tuple[str, str], ...]:
    if not isinstance(messages, list):
        raise UserError(f"{where}: messages is {_kind(messages)}, not a list of {{role, content}} objects")
    advice = "each message needs a role and a content"
    turns = []
    for i, message in enumerate(messages):
        at = f"{where}: messages[{i}]"
        if not isinstance(message, dict):
            raise UserError(f"{at} is {_kind(message)}, not an object with role and content")
        role = _string(at, message, "role", advice)
        if role not in ROLES:
            raise UserError(f"{at}: role {role!r} is not known; use {', '.join(ROLES)}")
        if role == "system" and i > 0:
            raise UserError(f"{at}: a system turn can only be the first; move it or make it a user turn")
        turns.append((role, _string(at, message, "content", advice)))
    if not any(role == "assistant" for role, _ in turns):
        raise UserError(f"{where}: messages has no assistant turn, so there is no answer to learn")
    return tuple(turns)


def _string(where: str, fields: dict[str, Any], name: str, advice: str = _OPTIONS) -> str:
    """The field's value: a string that is there, not blank, and can be written as UTF-8."""
    if name not in fields:
        raise UserError(f"{where}: lacks the field {name!r}; {_found(fields)}; {advice}")
    value = fields[name]
    if not isinstance(value, str):
        raise UserError(f"{where}: field {name!r} is {_kind(value)}, not a string; correct or remove the record")
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


def _kind(value: Any) -> str:
    """A value's JSON type, for messages."""
    return {
        dict: "an object",
        list: "a list",
        str: "a string",
        bool: "a truth value",
        int: "a number",
        float: "a number",
        type(None): "null",
    }[type(value)]
