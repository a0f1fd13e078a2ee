"""Documents: records as token ids with a loss mask; holding some of them out for validation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import singledispatch

import numpy as np

from rwkv_miss.config import DataOptions
from rwkv_miss.data.records import Record
from rwkv_miss.data.rendering import render
from rwkv_miss.data.tokenizers import END, Tokenizer
from rwkv_miss.errors import UserError


@dataclass(frozen=True, slots=True, eq=False)
class Document:
    """A document of L tokens.

    ids int32 (L,): they end in `END` unless the document was cut. mask bool (L,): true where the token carries loss as
    a target, which the first token never does.
    """

    ids: np.ndarray
    mask: np.ndarray

    @property
    def is_text(self) -> bool:
        """Whether every token after the first carries loss, as in plain text."""
        return bool(self.mask[1:].all())

    def piece(self, start: int, stop: int) -> Document:
        """The tokens from `start` up to `stop` as a document, of which the first carries no loss."""
        mask = self.mask[start:stop].copy()
        mask[0] = False
        return Document(self.ids[start:stop], mask)


def encode_record(record: Record, tokenizer: Tokenizer, vocab_size: int, options: DataOptions) -> Document:
    """The record's tokens and `END`. The tokens of learned spans and `END` carry loss.

    Each span is encoded by itself: a prompt has the tokens that a runtime gives it, and what is written after it begins
    with a token of its own, also where the texts together would have one across the border, such as `></`. So the
    mask's edges are exact.

    Args:
        vocab_size: the number of ids that the model has.

    Raises:
        UserError: the text has a token that the model does not have, or `END`, or the record has two answers to
            compare. The message names the record.
    """
    if record.rejected:
        raise UserError(
            f"{record.where}: has a chosen and a rejected answer, which no objective learns from yet; to learn the "
            "chosen ones alone, name them with prompt_field and answer_field, or write them as records of their own"
        )
    ids: list[int] = []
    mask: list[bool] = []
    for text, learned in render(record, options):
        tokens = tokenizer.encode(text)
        ids += tokens
        mask += [learned] * len(tokens)
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
def split_validation(
    documents: Sequence[Document], fraction: float, seed: int, group_size: int | None = None
) -> tuple[Sequence[Document], Sequence[Document]]:
    """Holds out a share of the documents for validation.

    Args:
        fraction: the share that is held out; 0 holds nothing out. Of a single plain text it is the last targets.
        seed: seed of the random choice.
        group_size: with n, documents n * i to n * i + n - 1 are a group, which stays together, and a single plain text
            is not split.

    Returns:
        The documents for training and those for validation, each in their order.

    Raises:
        UserError: `fraction` leaves either side empty, or the documents do not make whole groups.
    """
    if fraction == 0:
        return documents, []
    if group_size is None and len(documents) == 1 and documents[0].is_text:
        targets = len(documents[0].ids) - 1
        at = targets - count_held_out(fraction, targets, "tokens")
        return [documents[0].piece(0, at + 1)], [documents[0].piece(at, targets + 1)]
    n_units = len(documents) if group_size is None else count_groups(len(documents), group_size)
    held_out = count_held_out(fraction, n_units, "documents" if group_size is None else "groups")
    chosen = np.repeat(choose_held_out(held_out, n_units, seed), group_size or 1)
    train = [document for document, out in zip(documents, chosen, strict=True) if not out]
    return train, [document for document, out in zip(documents, chosen, strict=True) if out]


def count_groups(n_documents: int, group_size: int) -> int:
    """The number of groups of `group_size` consecutive documents. Raises UserError if some are left over."""
    if n_documents % group_size:
        raise UserError(
            f"{n_documents:,} records do not make groups of {group_size}: {n_documents % group_size} are left over; "
            "add the missing ones, or remove these"
        )
    return n_documents // group_size


def count_held_out(fraction: float, whole: int, unit: str) -> int:
    """How many of `whole` units are held out. Raises UserError if that leaves nothing on either side."""
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
    """Which of `whole` units are held out, bool (whole,): `held_out` of them, drawn by `seed`."""
    chosen = np.zeros(whole, dtype=bool)
    chosen[np.random.Generator(np.random.PCG64(seed)).choice(whole, held_out, replace=False)] = True
    return chosen
