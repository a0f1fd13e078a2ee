"""Documents: records as token ids with a loss mask; holding some of them out for validation."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np

from rwkv_miss.config import DataOptions
from rwkv_miss.data.ahead import ahead
from rwkv_miss.data.records import Record
from rwkv_miss.data.rendering import Span, render
from rwkv_miss.data.store import Store, Tokens, edges_of, store_in_memory
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


@dataclass(frozen=True, slots=True, eq=False)
class Documents(Sequence[Document]):
    """Documents of a store, or parts of them: document i is the tokens from starts[i] up to stops[i] of the store. The
    first of them carries no loss. starts and stops are int64 (documents,), ascending.

    Tokens are read when a document is asked for.
    """

    store: Store
    starts: np.ndarray
    stops: np.ndarray

    def __len__(self) -> int:
        return len(self.starts)

    @overload
    def __getitem__(self, i: int) -> Document: ...
    @overload
    def __getitem__(self, i: slice | np.ndarray) -> Documents: ...
    def __getitem__(self, i: int | slice | np.ndarray) -> Document | Documents:
        """Document i. For a slice or a bool array (documents,) instead, the documents that it selects."""
        if isinstance(i, (slice, np.ndarray)):
            return Documents(self.store, self.starts[i], self.stops[i])
        mask = self.store.mask(self.starts[i], self.stops[i])
        mask[:1] = False
        return Document(self.store.read(self.starts[i], self.stops[i]), mask)

    @property
    def targets(self) -> np.ndarray:
        """The tokens of each document after its first, int64 (documents,)."""
        return np.maximum(self.stops - self.starts - 1, 0)

    @property
    def learned(self) -> np.ndarray:
        """The tokens of each document that carry loss, int64 (documents,)."""
        return count_learned(self.store, self.starts, self.targets)


def count_learned(store: Store, starts: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """How many of `targets` tokens after the one at `starts` carry loss, int64 (places,)."""
    return store.learned_before(starts + 1 + targets) - store.learned_before(starts + 1)


def all_documents(store: Store) -> Documents:
    """The documents of a store, whole."""
    return Documents(store, store.offsets[:-1], store.offsets[1:])


def gather(documents: Sequence[Document]) -> Documents:
    """Documents as those of a store, which is in memory unless it is one already. There is at least one."""
    if isinstance(documents, Documents):
        return documents
    lengths = np.array([len(document.ids) for document in documents])
    mask = np.concatenate([document.mask for document in documents])
    ids = np.concatenate([document.ids for document in documents])
    return all_documents(store_in_memory("the data", [Tokens(ids, lengths, edges_of(mask))]))


def encode_record(record: Record, tokenizer: Tokenizer, vocab_size: int, options: DataOptions) -> Document:
    """The record's tokens and `END`: `encode_records` of one record."""
    tokens = encode_records([record], tokenizer, vocab_size, options)
    return all_documents(store_in_memory(record.where, [tokens]))[0]


def encode_records(records: Iterable[Record], tokenizer: Tokenizer, vocab_size: int, options: DataOptions) -> Tokens:
    """The tokens of each record and `END`, ids as int32. The tokens of learned spans and `END` carry loss.

    Each span is encoded by itself: a prompt has the tokens that a runtime gives it, and what is written after it begins
    with a token of its own, also where the texts together would have one across the border, such as `></`. So the
    mask's edges are exact.

    Args:
        vocab_size: the number of ids that the model has.

    Raises:
        UserError: the text has a token that the model does not have, or `END`, or a record has two answers to compare.
            The message names the first such record.
    """
    ids = array("I")  # a Python list takes ten times the memory, and an array of signed integers four times as long
    places: list[str] = []
    ends: list[int] = []
    span_ends, learned = [0], [False]
    for where, spans in ahead((record.where, _spans(record, options)) for record in records):
        for text, is_learned in spans:
            ids.fromlist(tokenizer.encode(text))
            span_ends.append(len(ids))
            learned.append(is_learned)
        ids.append(END)
        span_ends.append(len(ids))
        learned.append(True)
        places.append(where)
        ends.append(len(ids))
    tokens = np.array(ids, np.int32)
    lengths = np.diff(np.array(ends, np.int64), prepend=0)
    if tokens.max(initial=END) >= vocab_size or np.count_nonzero(tokens == END) > len(places):
        for where, of_record in zip(places, np.split(tokens, ends), strict=False):
            check_ids(where, of_record[:-1], tokenizer, vocab_size)
    return Tokens(tokens, lengths, edges_of(np.repeat(learned, np.diff(span_ends, prepend=0))))


def _spans(record: Record, options: DataOptions) -> list[Span]:
    if record.rejected:
        raise UserError(
            f"{record.where}: has a chosen and a rejected answer, which no objective learns from yet; to learn the "
            "chosen ones alone, name them with prompt_field and answer_field, or write them as records of their own"
        )
    return render(record, options)


def check_ids(where: str, ids: np.ndarray | Sequence[int], tokenizer: Tokenizer, vocab_size: int) -> None:
    """UserError if the ids of the text at `where` are not all the model's, or `END` is among them."""
    if (token := int(max(ids, default=END))) >= vocab_size:
        raise UserError(
            f"{where}: token {token} ({tokenizer.decode([token])!r}) of tokenizer {tokenizer.name} is not in "
            f"the model's vocabulary of {vocab_size} ids; choose the tokenizer that the model was trained with"
        )
    if END in ids:
        raise UserError(
            f"{where}: the text has token {END} of tokenizer {tokenizer.name}, which is kept for the end of a "
            "document (in bytes it is the NUL character); remove it from the text"
        )


def split_validation(
    sources: Sequence[Documents], fraction: float, seed: int, group_size: int | None = None
) -> tuple[list[Documents], list[Documents]]:
    """Holds out a share of the documents of all sources for validation.

    Args:
        fraction: the share that is held out; 0 holds nothing out. Of a single plain text it is the last targets.
        seed: seed of the random choice.
        group_size: with n, documents n * i to n * i + n - 1 are a group, which stays together, and a single plain text
            is not split.

    Returns:
        Of each source the documents for training and those for validation, each in their order. It may have none left
        on one side.

    Raises:
        UserError: `fraction` leaves either side empty, or the documents do not make whole groups.
    """
    if fraction == 0:
        return [*sources], [documents[:0] for documents in sources]
    n = group_size or 1
    counts = [count_groups(len(documents), n) for documents in sources]
    documents = sources[0]
    if group_size is None and sum(counts) == 1 and (documents.learned == documents.targets).all():
        at = documents.stops - 1 - _count_held_out(fraction, int(documents.targets[0]), "tokens")
        return [Documents(documents.store, documents.starts, at + 1)], [Documents(documents.store, at, documents.stops)]
    held_out = _count_held_out(fraction, sum(counts), "documents" if group_size is None else "groups")
    drawn = np.zeros(sum(counts), dtype=bool)
    drawn[np.random.Generator(np.random.PCG64(seed)).choice(len(drawn), held_out, replace=False)] = True
    chosen = [np.repeat(part, n) for part in np.split(drawn, np.cumsum(counts)[:-1])]
    kept = [documents[~out] for documents, out in zip(sources, chosen, strict=True)]
    return kept, [documents[out] for documents, out in zip(sources, chosen, strict=True)]


def count_groups(n_documents: int, group_size: int) -> int:
    """The number of groups of `group_size` consecutive documents. Raises UserError if some are left over."""
    if n_documents % group_size:
        raise UserError(
            f"{n_documents:,} records do not make groups of {group_size}: {n_documents % group_size} are left over; "
            "add the missing ones, or remove these"
        )
    return n_documents // group_size


def _count_held_out(fraction: float, whole: int, unit: str) -> int:
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
