"""JSON Lines: one JSON object a line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from rwkv_miss.config import DataOptions
from rwkv_miss.data.readers.block import BLOCK_SIZE, LONGEST, Block
from rwkv_miss.data.readers.fields import kind, record_of
from rwkv_miss.data.records import Record
from rwkv_miss.errors import UserError

_SPACE = " \t\r\n"  # what JSON calls white space
_DECODER = json.JSONDecoder()  # `json.loads` takes as long for its arguments as for a short text


def jsonl_blocks(path: Path, file: BinaryIO, options: DataOptions) -> Iterator[Block]:
    """Whole lines as bytes, some MB at a time."""
    number = 1
    while content := file.read(BLOCK_SIZE):
        rest = file.readline(LONGEST + 1)
        content, lines = content + rest, content.count(b"\n")
        if len(rest) > LONGEST:
            raise UserError(f"{path}:{number + lines}: is longer than {LONGEST:,} bytes; no record may be, so part it")
        yield Block(path, number, content)
        number += lines + rest.endswith(b"\n")


def jsonl_records(block: Block, options: DataOptions) -> Iterator[Record]:
    """A record for each line that is not blank; see `record_of` for the fields."""
    path = str(block.path)
    for number, raw in enumerate(block.content.split(b"\n"), start=block.first):
        if not raw or raw.isspace():
            continue
        where = f"{path}:{number}"
        yield record_of(where, _object(where, raw), options)


def _object(where: str, raw: bytes) -> dict[str, Any]:
    """The JSON object in a line. Raises UserError if there is none."""
    try:
        item = msgspec.json.decode(raw)  # in half of the time that `json` takes
        if isinstance(item, dict):
            return item
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        pass  # `json` reads more, such as NaN, and says where the mistake is
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: is not UTF-8 ({error.reason}); convert the file to UTF-8") from error
    return parse_object(where, text, "give one object a line")


def parse_object(where: str, text: str, advice: str) -> dict[str, Any]:
    """The JSON object in a text. Raises UserError if there is none."""
    try:
        item, end = _DECODER.raw_decode(text, len(text) - len(text.lstrip(_SPACE)))
        if text[end:].strip(_SPACE):
            raise json.JSONDecodeError("Extra data", text, end)
    except json.JSONDecodeError as error:
        said = error.msg.removesuffix(" at")  # "Unterminated string starting at" and its like
        raise UserError(f"{where}: is not JSON ({said} at column {error.colno}); {advice}") from error
    except (ValueError, RecursionError) as error:  # a number of too many digits, nesting too deep
        raise UserError(f"{where}: cannot be read as JSON ({error})") from error
    if not isinstance(item, dict):
        raise UserError(f"{where}: is {kind(item)}, not an object; {advice}")
    return item
