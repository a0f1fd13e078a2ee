"""Text files: opened as they are or unpacked, and decoded."""

from __future__ import annotations

import codecs
import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from rwkv_miss.data.readers.block import BLOCK_SIZE, refuse_bomb
from rwkv_miss.errors import UserError

PACKED = (".gz", ".zst")
"""The suffixes of compressed files, which follow that of what is in them."""

# Blocks of 128 kB may take 4 bytes each in a .zst: as many bytes at a time unpack to at most 32 MB.
_PACKED_AT_ONCE = 1 << 10
_UTF_16_OR_32 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)


@contextmanager
def open_text(path: Path) -> Iterator[BinaryIO]:
    """The bytes of a text file, unpacked if it is a `PACKED` one, after a byte order mark of UTF-8.

    Raises:
        UserError: it begins as UTF-16 and UTF-32 do, or cannot be unpacked.
    """
    with path.open("rb") as raw:
        unpacked = {".gz": _gunzip, ".zst": _unzstd}.get(path.suffix.lower())
        file = io.BufferedReader(_Unpacked(path, raw, unpacked(raw))) if unpacked else raw
        head = file.peek(4)
        if head.startswith(_UTF_16_OR_32):
            raise UserError(f"{path}: begins as UTF-16 and UTF-32 do; convert it: iconv -f UTF-16 -t UTF-8 FILE > OUT")
        if head.startswith(codecs.BOM_UTF8):
            file.read(len(codecs.BOM_UTF8))
        yield file


def decoded(path: Path, file: BinaryIO) -> Iterator[str]:
    """The text of a file in pieces, one of which may be empty.

    Raises:
        UserError: it is not UTF-8, or holds a NUL, as UTF-16 without a mark does.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    line = 1
    data = b"-"
    while data:
        data = file.read(BLOCK_SIZE)
        text = _checked(path, line, data, lambda data: decoder.decode(data, final=not data))
        line += text.count("\n")
        yield text


def decoded_line(path: Path, line: int, raw: bytes) -> str:
    """The text of a line. Raises UserError as `decoded` does."""
    return _checked(path, line, raw, bytes.decode)


def _checked(path: Path, line: int, data: bytes, decode: Callable[[bytes], str]) -> str:
    """The text in data that begin in this line."""
    try:
        text = decode(data)
    except UnicodeDecodeError as error:
        line += error.object.count(b"\n", 0, error.start)
        raise UserError(f"{path}: line {line} is not UTF-8 ({error.reason}); convert the file to UTF-8") from error
    if (at := text.find("\0")) >= 0:
        line += text.count("\n", 0, at)
        raise UserError(f"{path}: line {line} holds a NUL; if the file is UTF-16, convert it to UTF-8, or repair it")
    return text


class _Unpacked(io.RawIOBase):
    """The bytes in `pieces`, which `packed` unpacks to, while they are not too many for it."""

    def __init__(self, path: Path, packed: BinaryIO, pieces: Iterator[bytes]) -> None:
        self._path, self._packed, self._pieces = path, packed, pieces
        self._rest = memoryview(b"")
        self._size = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        filled = 0
        while filled < len(buffer) and (self._rest or self._next()):
            n = min(len(self._rest), len(buffer) - filled)
            buffer[filled : filled + n], self._rest = self._rest[:n], self._rest[n:]
            filled += n
        return filled

    def _next(self) -> bool:
        """Whether there is another piece."""
        try:
            piece = next(self._pieces, b"")
        except (EOFError, ValueError, zlib.error, gzip.BadGzipFile) as error:
            raise UserError(f"{self._path}: is damaged, or is not a {self._path.suffix} file ({error})") from error
        self._rest = memoryview(piece)
        self._size += len(piece)
        refuse_bomb(self._path, self._packed.tell(), self._size)
        return bool(piece)


def _gunzip(packed: BinaryIO) -> Iterator[bytes]:
    """Raises EOFError, zlib.error or BadGzipFile for what is damaged."""
    with gzip.GzipFile(fileobj=packed) as file:
        yield from iter(lambda: file.read(1 << 18), b"")


def _unzstd(packed: BinaryIO) -> Iterator[bytes]:
    """Raises ValueError or EOFError for what is damaged."""
    import zstandard

    frame, rest = None, b""
    while data := rest or packed.read(_PACKED_AT_ONCE):
        frame = frame or zstandard.ZstdDecompressor().decompressobj()
        try:
            piece = frame.decompress(data)
        except zstandard.ZstdError as error:
            raise ValueError(error) from error
        if piece:
            yield piece
        rest = frame.unused_data
        if frame.eof:
            frame = None
    if frame is not None:
        raise EOFError("it is cut off")
