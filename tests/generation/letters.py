"""A vocabulary in which each id is a letter, so that a text says which tokens were chosen."""

from __future__ import annotations

import random

from rwkv_miss.data.tokenizers import END, Tokenizer
from rwkv_miss.generation.engine import Piece


def letters(ids: list[int]) -> str:
    return "".join(chr(0x100 + i) for i in ids if i != END)


LETTERS = Tokenizer("letters", 64, lambda text: [ord(c) - 0x100 for c in text], letters)


def prompt_of(n_tokens: int, seed: int) -> list[int]:
    return [random.Random(seed * 1000 + i).randrange(1, 64) for i in range(n_tokens)]


def text_of(pieces: list[Piece], member: int | None = None) -> str:
    return "".join(piece.text for piece in pieces if member is None or piece.member == member)


def ids_of(pieces: list[Piece], member: int) -> list[int]:
    return [token for piece in pieces if piece.member == member for token in piece.ids]
