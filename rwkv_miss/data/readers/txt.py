"""Plain text: one document, or several with a separator between them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from rwkv_miss.config import DataOptions
from rwkv_miss.data.readers.block import BLOCK_SIZE, LONGEST, Block
from rwkv_miss.data.readers.text import decoded
from rwkv_miss.data.records import Record, Turn
from rwkv_miss.errors import UserError


def txt_blocks(path: Path, file: BinaryIO, options: DataOptions) -> Iterator[Block]:
    """Some documents, each with the number of its first line: the whole file, or the pieces between the `separator`s.
    Pieces of white space alone are skipped. CRLF is read as LF."""
    documents: list[tuple[int, str]] = []
    size = 0
    for line, text in _documents(path, file, options.separator):
        if text.strip():
            documents.append((line, text))
            size += len(text)
        if size >= BLOCK_SIZE:
            yield Block(path, documents[0][0], documents)
            documents, size = [], 0
    if documents:
        yield Block(path, documents[0][0], documents)


def txt_records(block: Block, options: DataOptions) -> Iterator[Record]:
    for line, text in block.content:
        yield Record(f"{block.path}:{line}", (Turn("text", text),))


def _documents(path: Path, file: BinaryIO, separator: str | None) -> Iterator[tuple[int, str]]:
    """Each document and the number of its first line. Raises UserError if one between separators is too long."""
    if separator is None:
        yield 1, "".join(_with_lf(decoded(path, file)))
        return
    line, text = 1, ""
    for piece in _with_lf(decoded(path, file)):
        *whole, text = (text + piece).split(separator)
        for document in whole:
            yield line, document
            line += document.count("\n") + separator.count("\n")
        if len(text) > LONGEST:
            raise UserError(
                f"{path}:{line}: the document is longer than {LONGEST:,} characters; is separator {separator!r} right?"
            )
    yield line, text


def _with_lf(pieces: Iterator[str]) -> Iterator[str]:
    r"""The pieces with `\r\n` made `\n`, also where it is in two of them."""
    held = ""
    for piece in pieces:
        text = held + piece
        held = "\r" if text.endswith("\r") else ""
        yield text.removesuffix("\r").replace("\r\n", "\n")
    yield held
