"""JSON: an array of objects, or objects one after the other, as some programs call .json what is .jsonl."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from rwkv_miss.config import DataOptions
from rwkv_miss.data.readers.block import BLOCK_SIZE, LONGEST, Block
from rwkv_miss.data.readers.fields import record_of
from rwkv_miss.data.readers.jsonl import parse_object
from rwkv_miss.data.readers.text import decoded
from rwkv_miss.data.records import Record
from rwkv_miss.errors import UserError

_DECODER = json.JSONDecoder()
_ADVICE = "give an array of objects"
_SPACE = re.compile(r"[ \t\r\n]*")
# The most characters that a token which is cut at the end of the text can have without being a string: -Infinity, or an
# escaped pair of surrogates.
_CUT = 12


def json_blocks(path: Path, file: BinaryIO, options: DataOptions) -> Iterator[Block]:
    """The texts of some items, as a list."""
    first, items, size = 1, [], 0
    for item in _items(path, decoded(path, file)):
        items.append(item)
        size += len(item)
        if size >= BLOCK_SIZE:
            yield Block(path, first, items)
            first, items, size = first + len(items), [], 0
    if items:
        yield Block(path, first, items)


def json_records(block: Block, options: DataOptions) -> Iterator[Record]:
    """A record for each item; see `record_of` for the fields."""
    for number, text in enumerate(block.content, start=block.first):
        where = f"{block.path}:{number}"
        yield record_of(where, parse_object(where, text, _ADVICE), options)


def _items(path: Path, pieces: Iterator[str]) -> Iterator[str]:
    """The texts of an array's items, or of objects without an array, from a text in pieces.

    Raises:
        UserError: the text is not JSON, or an item is too long.
    """
    text = _Text(pieces)
    is_array = text.sign() == "["
    text.at += is_array
    number = 0
    while (sign := text.sign()) or is_array:
        if is_array and sign == "]":
            text.at += 1
            if sign := text.sign():
                raise UserError(f"{path}: has more after the array, which ends with item {number}: {sign!r}")
            return
        if is_array and number:
            if sign != ",":
                found = repr(sign) if sign else "the end of the file"
                raise UserError(f"{path}:{number}: a comma or ] has to follow, not {found}; is the file cut off?")
            text.at += 1
            text.sign()
        number += 1
        yield text.item(f"{path}:{number}")


class _Text:
    """A text that comes in pieces, of which only what is from `at` on is needed."""

    def __init__(self, pieces: Iterator[str]) -> None:
        self.at = 0
        self._text = ""
        self._pieces = pieces

    def _more(self) -> bool:
        """Whether there was another piece."""
        piece = next(self._pieces, None)
        self._text, self.at = self._text[self.at :] + (piece or ""), 0
        return piece is not None

    def sign(self) -> str:
        """The next character that is not white space, where `at` then is; empty at the end."""
        while True:
            if space := _SPACE.match(self._text, self.at):
                self.at = space.end()
            if self.at < len(self._text) or not self._more():
                return self._text[self.at : self.at + 1]

    def item(self, where: str) -> str:
        """The text of the value at `at`, which is then behind it. Raises UserError if there is none."""
        while True:
            try:
                _, end = _DECODER.raw_decode(self._text, self.at)
            except json.JSONDecodeError as error:
                is_cut = error.msg.startswith("Unterminated string") or error.pos > len(self._text) - _CUT
                if len(self._text) - self.at > LONGEST and is_cut:
                    raise UserError(f"{where}: is longer than {LONGEST:,} characters; no record may be") from error
                if not (is_cut and self._more()):
                    said, place = error.msg.removesuffix(" at"), error.pos - self.at + 1
                    raise UserError(f"{where}: is not JSON ({said} at character {place}); {_ADVICE}") from error
            except (ValueError, RecursionError) as error:  # a number of too many digits, nesting too deep
                raise UserError(f"{where}: cannot be read as JSON ({error})") from error
            else:
                found, self.at = self._text[self.at : end], end
                return found
