"""JSON Lines: one JSON object a line."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from rwkv_miss.config import DataOptions
from rwkv_miss.data.readers.block import Block
from rwkv_miss.data.readers.fields import kind, record_of
from rwkv_miss.data.records import Record
from rwkv_miss.errors import UserError

_BLOCK = 1 << 22


def jsonl_blocks(path: Path, file: BinaryIO, options: DataOptions) -> Iterator[Block]:
    """Whole lines as bytes, some MB at a time. A byte order mark is skipped."""
    if options.separator is not None:
        raise UserError(f"{path}: separator is for .txt files; leave it out for .jsonl")
    number, rest = 1, file.read(len(codecs.BOM_UTF8)).removeprefix(codecs.BOM_UTF8)
    while piece := file.read(_BLOCK):
        lines, newline, after = piece.rpartition(b"\n")
        if newline:
            content, rest = rest + lines + newline, after
            yield Block(path, number, content)
            number += content.count(b"\n")
        else:
            rest += piece
    if rest:
        yield Block(path, number, rest)


def jsonl_records(block: Block, options: DataOptions) -> Iterator[Record]:
    """A record for each line that is not blank; see `record_of` for the fields."""
    for number, raw in enumerate(block.content.split(b"\n"), start=block.first):
        where = f"{block.path}:{number}"
        if not raw.strip():
            continue
        try:
            item = json.loads(raw.rstrip(b"\r").decode("utf-8"))
        except UnicodeDecodeError as error:
            raise UserError(f"{where}: is not UTF-8 ({error.reason}); convert the file to UTF-8") from error
        except json.JSONDecodeError as error:
            said = error.msg.removesuffix(" at")  # "Unterminated string starting at" and its like
            raise UserError(f"{where}: is not JSON ({said} at column {error.colno}); give one object a line") from error
        except (ValueError, RecursionError) as error:  # a number of too many digits, nesting too deep
            raise UserError(f"{where}: cannot be read as JSON ({error})") from error
        if not isinstance(item, dict):
            raise UserError(f"{where}: is {kind(item)}, not an object; give one object a line")
        yield record_of(where, item, options)
