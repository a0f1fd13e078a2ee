"""Tokenizers: text to token ids and back. In every one of them id 0 is the end of a document."""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import tokenizers
from pyrwkv_tokenizer import RWKVTokenizer

from rwkv_miss.errors import UserError
from rwkv_miss.files import check_name

END = 0
"""The token that ends a document."""


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A tokenizer whose highest id is vocab_size - 1.

    `encode` turns text into ids. `decode` turns ids into text, with U+FFFD for bytes that are not UTF-8 and nothing for
    `END`. Both may be called from several threads. A pickled tokenizer is loaded again by its name.

    `settles(id)`: whether no token after this one can change the text up to it, except for a last U+FFFD, which may
    be a character that is not yet complete. It is false for tokens without text as well.
    `pieces()`: the bytes of each id, from 0 on; None for a tokenizer whose tokens are not bytes that are joined.
    """

    name: str
    vocab_size: int
    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]
    settles: Callable[[int], bool] = lambda _: True
    pieces: Callable[[], Sequence[bytes]] | None = None

    def __reduce__(self) -> tuple[Callable[[str], Tokenizer], tuple[str]]:
        return load_tokenizer, (self.name,)


def load_tokenizer(name: str) -> Tokenizer:
    """Loads a tokenizer by its name: `world` (RWKV World, ids 1 to 65529), `bytes` (UTF-8 bytes, ids 1 to 255), or the
    path of a Hugging Face `tokenizer.json`.

    In `bytes` the NUL character has the id of `END`; `encode_record` refuses text that holds it.

    Raises:
        UserError: the name is none of these, or the file cannot be read.
    """
    if name == "world":
        return _world()
    if name == "bytes":
        pieces = [b"", *(bytes([i]) for i in range(1, 256))]
        return Tokenizer(
            name,
            256,
            lambda text: list(text.encode("utf-8")),
            lambda ids: _join(pieces, ids),
            pieces=lambda: pieces,
        )
    return _hugging_face(name)


@cache
def _world() -> Tokenizer:
    world = RWKVTokenizer()
    # The package's own decode panics on ids that do not join to UTF-8, which a model may well produce.
    return Tokenizer(
        "world",
        world.vocab_size(),
        world.tokenizer.encode,
        lambda ids: _join(_world_pieces(world.vocab_filepath), ids),
        pieces=lambda: _world_pieces(world.vocab_filepath),
    )


@cache
def _world_pieces(vocabulary: str) -> list[bytes]:
    """The bytes of each id. A line of the vocabulary's file holds an id, a Python literal (a string or bytes), and the
    length in bytes."""
    pieces = [b""]
    for line in Path(vocabulary).read_text(encoding="utf-8").removesuffix("\n").split("\n"):
        index, rest = line.split(" ", 1)
        literal = ast.literal_eval(rest.rsplit(" ", 1)[0])
        assert int(index) == len(pieces), line
        pieces.append(literal.encode("utf-8") if isinstance(literal, str) else literal)
    return pieces


def _join(pieces: list[bytes], ids: list[int]) -> str:
    """The text of `ids`. An id beyond the table, which a model with a larger vocabulary may write, becomes U+FFFD."""
    joined = b"".join(pieces[i] if i < len(pieces) else b"\xff" for i in ids)
    return joined.decode("utf-8", errors="replace")


def _hugging_face(name: str) -> Tokenizer:
    path = Path(name)
    check_name(path, "a tokenizer")
    if not path.is_file():
        raise UserError(f"tokenizer {name!r}: no such file; give world, bytes, or the path of a tokenizer.json")
    try:
        inner = tokenizers.Tokenizer.from_file(name)
    except Exception as error:  # the library raises nothing more specific
        message = f"tokenizer {name!r}: is not a Hugging Face tokenizer.json ({error})"
        raise UserError(message) from error
    ids = frozenset(inner.get_vocab(with_added_tokens=True).values())
    if not ids:
        raise UserError(f"tokenizer {name!r}: has no tokens")
    inner.no_truncation()
    inner.no_padding()

    def encode(text: str) -> list[int]:
        try:
            return inner.encode(text, add_special_tokens=False).ids
        except Exception as error:  # such as an unknown word, if there is no token for those
            raise UserError(f"tokenizer {name!r}: cannot encode {text[:40]!r} ({error})") from error

    def decode(ids: list[int]) -> str:
        return inner.decode([i for i in ids if i != END], skip_special_tokens=False)

    # Where a character that has no token is written as tokens of its bytes, `<0xE4>` and so on, the decoder turns a
    # run of them into text as a whole: one byte that does not fit makes U+FFFD of all.
    names = {f"<0x{byte:02X}>" for byte in range(256)}
    bytes_of_runs = {i for n in names if (i := inner.token_to_id(n)) is not None and decode([i]) != n}
    return Tokenizer(name, max(ids) + 1, encode, decode, (ids - bytes_of_runs - {END}).__contains__)
