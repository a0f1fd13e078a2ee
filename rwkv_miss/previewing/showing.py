"""Records as pieces of text: what is learned, what is not, and what is cut off."""

from __future__ import annotations

import re
import unicodedata

import numpy as np

from rwkv_miss.data.documents import Document
from rwkv_miss.data.rendering import Span
from rwkv_miss.data.tokenizers import END, Tokenizer
from rwkv_miss.previewing.found import Piece, Shown
from rwkv_miss.previewing.lengths import pieces

_NAMED = {"\t": "→", "\r": "␍", "\n": "⏎", "\x7f": "␡"}


def show_record(
    where: str, spans: list[Span] | None, document: Document, tokenizer: Tokenizer, ctx_len: int, carry: bool
) -> Shown:
    """A record as the model will see it.

    Args:
        spans: its text; None for a document of which there are only the tokens.
    """
    ids = document.ids.tolist()
    found: list[Piece] = []
    if spans is None:
        found.append(Piece(tokenizer.decode(ids), [i for i in ids if i != END], learned=True))
    for text, learned in spans or []:
        found.append(Piece(text, tokenizer.encode(text), learned))
    if ids[-1:] == [END]:
        found.append(Piece("", [END], learned=bool(document.mask[-1]), is_end=True))
    kept = len(ids) if carry or document.is_text else ctx_len + 1
    return Shown(
        where,
        "plain text" if document.is_text else "conversation",
        max(len(ids) - 1, 0),
        int(np.count_nonzero(document.mask)),
        len(pieces(document, ctx_len, carry)),
        _cut(found, kept, tokenizer),
    )


def _cut(found: list[Piece], kept: int, tokenizer: Tokenizer) -> list[Piece]:
    """The pieces, with what lies behind the first `kept` tokens marked as cut off."""
    cut: list[Piece] = []
    for piece in found:
        before = max(0, min(kept, len(piece.ids)))
        kept -= len(piece.ids)
        if before == len(piece.ids):
            cut.append(piece)
            continue
        at = len(tokenizer.decode(piece.ids[:before]))
        if before:
            cut.append(Piece(piece.text[:at], piece.ids[:before], piece.learned))
        cut.append(Piece(piece.text[at:], piece.ids[before:], piece.learned, is_cut=True, is_end=piece.is_end))
    return cut


def visible(text: str) -> str:
    r"""The text with a picture for every character that would not be seen, and for spaces at its ends and at the ends
    of lines; a line break stays behind its picture."""
    text = re.sub(r"^ +| +(?=\n|$)", lambda found: "·" * len(found[0]), text)
    return "".join(_picture(character) for character in text)


def _picture(character: str) -> str:
    if character in _NAMED:
        return _NAMED[character] + "\n" * (character == "\n")
    if character < " ":
        return chr(0x2400 + ord(character))
    if character != " " and unicodedata.category(character) in ("Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp", "Zs"):
        return f"<U+{ord(character):04X}>"
    return character


def shorten(text: str, most: int) -> tuple[str, int, str]:
    """The beginning and the end of a text that is longer than `most` characters, and how many are between them; of
    another one the text, 0 and nothing."""
    if len(text) <= most:
        return text, 0, ""
    return text[: most // 2], len(text) - 2 * (most // 2), text[-(most // 2) :]
