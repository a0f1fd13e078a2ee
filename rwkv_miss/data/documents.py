"""Documents: records as token ids with a loss mask; holding some out, and fitting them to a context length."""

from __future__ import annotations

from dataclasses import dataclass
from functools import singledispatch

import numpy as np

from rwkv_miss.data.records import Record
from rwkv_miss.data.templates import render
from rwkv_miss.data.tokenizers import END, Tokenizer
from rwkv_miss.errors import UserError


@dataclass(frozen=True, slots=True, eq=False)
class Document:
    """`ids` int32 (L,), ending in `END` unless it was cut; `mask` bool (L,): true where the token carries loss
    as a target. The first token is never a target. A mask true from the second token on is plain text.
    """

    ids: np.ndarray
    mask: np.ndarray


def encode_record(record: Record, tokenizer: Tokenizer, vocab_size: int) -> Document:
    """The record's tokens and `END`; the tokens of answer segments, and `END`, carry loss.

    Segments are encoded one by one, so the mask's edges are exact and a prompt has the tokens that a runtime
    gives it. Raises UserError, naming the record, for a token that the model (`vocab_size` ids) does not have
    and for `END` inside the text.
    """
    ids: list[int] = []
    mask: list[bool] = []
    for text, is_answer in render(record):
        tokens = tokenizer.encode(text)
        ids += tokens
        mask += [is_answer] * len(tokens)
    if ids and max(ids) >= vocab_size:
        token = max(ids)
        raise UserError(
            f"{record.where}: token {token} ({tokenizer.decode([token])!r}) of tokenizer {tokenizer.name} is not in "
            f"the model's vocabulary of {vocab_size} ids; choose the tokenizer that the model was trained with"
        )
    if END in ids:
        raise UserError(
            f"{record.where}: the text has token {END} of tokenizer {tokenizer.name}, which is kept for the end of a "
            "document (in bytes it is the NUL character); remove it from the text"
        )
    document = Document(np.array([*ids, END], dtype=np.int32), np.array([*mask, True]))
    document.mask[0] = False
    return document


@singledispatch
def split_validation(documents: list[Document], fraction: float, seed: int) -> tuple[list[Document], list[Document]]:
    """(training, validation): `fraction` of the documents, drawn by `seed`, is held out; both keep their order.

    Of a single plain text its last `fraction` of targets is held out. A fraction of 0 holds nothing out; one
    that leaves either side empty raises UserError.
    """
    if fraction == 0:
        return documents, []
    single_text = len(documents) == 1 and bool(documents[0].mask[1:].all())
    whole = len(documents[0].ids) - 1 if single_text else len(documents)
    held_out = count_held_out(fraction, whole, "tokens" if single_text else "documents")
    if single_text:
        at = whole - held_out
        return [_piece(documents[0], 0, at + 1)], [_piece(documents[0], at, whole + 1)]
    chosen = choose_held_out(held_out, whole, seed)
    train = [document for document, out in zip(documents, chosen, strict=True) if not out]
    return train, [document for document, out in zip(documents, chosen, strict=True) if out]


def count_held_out(fraction: float, whole: int, unit: str) -> int:
    """How many of `whole` units are held out; UserError where that leaves nothing on either side."""
    if not 0 <= fraction < 1:
        raise UserError(f"val_split is {fraction}; it must be at least 0 and less than 1")
    held_out = round(whole * fraction)
    if not 0 < held_out < whole:
        raise UserError(
            f"val_split {fraction} of {whole} {unit} is {held_out}, which leaves "
            f"{'nothing to train on' if held_out else 'nothing to validate on'}; change val_split or give val_data"
        )
    return held_out


def choose_held_out(held_out: int, whole: int, seed: int) -> np.ndarray:
    """Which of `whole` documents are held out, bool (whole,): `held_out` of them, drawn by `seed`."""
    chosen = np.zeros(whole, dtype=bool)
    chosen[np.random.Generator(np.random.PCG64(seed)).choice(whole, held_out, replace=False)] = True
    return chosen


def split_long(documents: list[Document], ctx_len: int, carry: bool = False) -> tuple[list[Document], int, int]:
    """Fits documents to ctx_len (input, target) positions, that is ctx_len + 1 tokens.

    Longer plain text is split into pieces that share one token, so that every target stays, once. Other longer
    documents are truncated at the end, or with `carry` split as well, without the pieces that have no loss token.
    Documents with no loss token (left) are dropped. Returns (documents, number truncated or split that are not
    plain text, number dropped); raises UserError where every document would be dropped.
    """
    assert ctx_len >= 1
    fitted = []
    too_long = dropped = 0
    for document in documents:
        length = len(document.ids)
        is_text = bool(document.mask[1:].all())
        stop = length if is_text or carry else min(length, ctx_len + 1)
        pieces = [_piece(document, i, i + ctx_len + 1) for i in range(0, stop - 1, ctx_len)]
        pieces = [piece for piece in pieces if piece.mask.any()]
        fitted += pieces
        if not pieces:
            dropped += 1
        elif length > ctx_len + 1 and not is_text:
            too_long += 1
    if not fitted:
        needed = [int(np.argmax(document.mask)) for document in documents if document.mask[1:].any()]
        if not needed:
            raise UserError(f"none of the {len(documents)} records has a token that carries loss")
        raise UserError(
            f"ctx_len {ctx_len} is too short: it cuts off every answer of the {len(documents)} records; "
            f"the first answer token needs a ctx_len of at least {min(needed)}"
        )
    return fitted, too_long, dropped


def _piece(document: Document, start: int, stop: int) -> Document:
    """Tokens start..stop-1 as a document of their own: the first is context only."""
    mask = document.mask[start:stop].copy()
    mask[0] = False
    return Document(document.ids[start:stop], mask)
