"""Plain text: one document, or several with a separator between them."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from rwkv_miss.config import DataOptions
from rwkv_miss.data.records import Record, Turn
from rwkv_miss.errors import UserError


def read_txt(path: Path, file: BinaryIO, options: DataOptions) -> Iterator[Record]:
    """The whole file as one document, or the pieces between the `separator`s; pieces of white space alone are skipped.
    CRLF is read as LF, a byte order mark is skipped."""
    if options.prompt_field is not None or options.text_field != "text":
        raise UserError(f"{path}: a .txt file has no fields; leave out prompt_field, answer_field and text_field")
    data = file.read().removeprefix(codecs.BOM_UTF8)
    try:
        text = data.decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: is not UTF-8 ({error.reason}); convert the file to UTF-8") from error
    separator = options.separator
    line = 1
    for piece in [text] if separator is None else text.split(separator):
        if piece.strip():
            yield Record(f"{path}:{line}", (Turn("text", piece),))
        line += piece.count("\n") + (separator or "").count("\n")
