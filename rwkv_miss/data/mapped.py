"""Documents and rows of a binidx, cut from its memory-mapped tokens when they are asked for: what is kept in memory is
where documents and pieces begin, not the tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import overload

import numpy as np

from rwkv_miss.config import DataOptions
from rwkv_miss.data.binidx import BinIdx, read_binidx
from rwkv_miss.data.documents import Document, choose_held_out, count_held_out, split_validation
from rwkv_miss.data.packing import NO_LOSS, PackReport, Rows, make_rows, pack_lengths
from rwkv_miss.data.tokenizers import END
from rwkv_miss.errors import UserError

# How many tokens at the beginning, at the end, and at random places of a file are checked when it is opened.
_SAMPLE = 4096
# Options that a binidx has no use for.
_OF_OTHER_FORMATS = ("text_field", "prompt_field", "answer_field", "separator")


@dataclass(frozen=True, slots=True, eq=False)
class MappedDocuments(Sequence[Document]):
    """Documents of plain text: document i is file.tokens[starts[i]:stops[i]], with starts and stops int64 (documents,).

    They are taken as they stand: a document that lacks an `END` is not given one. Nothing is learned from a document
    of fewer than 2 tokens.
    """

    file: BinIdx
    vocab_size: int
    starts: np.ndarray
    stops: np.ndarray

    def __len__(self) -> int:
        return len(self.starts)

    @overload
    def __getitem__(self, i: int) -> Document: ...
    @overload
    def __getitem__(self, i: slice | np.ndarray) -> MappedDocuments: ...
    def __getitem__(self, i: int | slice | np.ndarray) -> Document | MappedDocuments:
        """Document i. For a slice or a bool array (documents,) instead, the documents that it selects."""
        if isinstance(i, (slice, np.ndarray)):
            return MappedDocuments(self.file, self.vocab_size, self.starts[i], self.stops[i])
        ids = self.tokens(self.starts[i], self.stops[i])
        return Document(ids, np.arange(len(ids)) > 0)

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """file.tokens[start:stop] as int32. Raises UserError if one is not in the vocabulary."""
        ids = self.file.tokens[start:stop]
        _check_ids(self.file, self.vocab_size, ids, range(start, stop))
        return ids.astype(np.int32)


def open_documents(prefix: str | Path, vocab_size: int, options: DataOptions) -> MappedDocuments:
    """The documents of PREFIX.bin and PREFIX.idx for a model of `vocab_size` ids.

    The first, the last and some random tokens are looked at here, all the others when they are used.

    Raises:
        UserError: a token is not in the vocabulary (the message names its document), the pair cannot be read, or
            `options` name fields or a separator, of which a binidx has none.
    """
    if any(getattr(options, name) != getattr(DataOptions(), name) for name in _OF_OTHER_FORMATS):
        raise UserError(f"{prefix}: a binidx has no fields; leave out {', '.join(_OF_OTHER_FORMATS)}")
    file = read_binidx(prefix)
    n = len(file.tokens)
    anywhere = np.random.Generator(np.random.PCG64(0)).integers(n, size=_SAMPLE)
    places = np.unique(np.r_[0 : min(n, _SAMPLE), max(n - _SAMPLE, 0) : n, anywhere])
    _check_ids(file, vocab_size, file.tokens[places], places)
    return MappedDocuments(file, vocab_size, file.offsets[:-1], file.offsets[1:])


def _check_ids(file: BinIdx, vocab_size: int, ids: np.ndarray, places: np.ndarray | range) -> None:
    """Raises UserError unless all `ids`, which stand at `places` in the file, are from 0 up to vocab_size."""
    if ids.size and not 0 <= ids.min() <= ids.max() < vocab_size:
        i = int(np.argmax((ids < 0) | (ids >= vocab_size)))
        raise UserError(
            f"{file.prefix}.bin: document {file.document_at(places[i])} (of 0 to {len(file) - 1}): token {ids[i]} is "
            f"not in the model's vocabulary of {vocab_size} ids; make the binidx again with the model's tokenizer"
        )


@split_validation.register
def _(
    documents: MappedDocuments, fraction: float, seed: int, group_size: int | None = None
) -> tuple[MappedDocuments, MappedDocuments]:
    _refuse_groups(documents, group_size)
    if fraction == 0:
        return documents, documents[:0]
    if len(documents) > 1:
        held_out = count_held_out(fraction, len(documents), "documents")
        chosen = choose_held_out(held_out, len(documents), seed)
        return documents[~chosen], documents[chosen]
    targets = int(documents.stops[0] - documents.starts[0]) - 1
    at = documents.stops - 1 - count_held_out(fraction, targets, "tokens")
    file, vocab_size = documents.file, documents.vocab_size
    return (
        MappedDocuments(file, vocab_size, documents.starts, at + 1),
        MappedDocuments(file, vocab_size, at, documents.stops),
    )


def _refuse_groups(documents: MappedDocuments, group_size: int | None) -> None:
    if group_size is not None:
        raise UserError(
            f"{documents.file.prefix}: a binidx does not say which documents belong to a group; give records, such as "
            "a .jsonl file"
        )


@dataclass(frozen=True, slots=True, eq=False)
class MappedRows:
    """Rows of pieces of documents, without groups; see `AnyRows`. Row i holds the pieces
    members[bounds[i]:bounds[i + 1]]; piece j has the inputs documents.file.tokens[starts[j]:starts[j] + lengths[j]]
    and, one position further, the targets.

    An `END` inside a document begins a new one, so the state is reset there too.
    """

    documents: MappedDocuments
    width: int
    starts: np.ndarray
    lengths: np.ndarray
    members: np.ndarray
    bounds: np.ndarray

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def fingerprint(self) -> str:
        """Of where each row's pieces are, and of 17 evenly spaced tokens of up to 1,024 pieces: the file may be too
        large to be read whole."""
        digest = hashlib.sha256()
        for array in (self.starts, self.lengths, self.members, self.bounds):
            digest.update(np.ascontiguousarray(array).data)
        pieces = np.unique(np.linspace(0, len(self.starts) - 1, 1024).astype(np.int64))
        places = self.starts[pieces] + self.lengths[pieces] * np.arange(17)[:, None] // 16
        digest.update(np.ascontiguousarray(self.documents.file.tokens[places]).data)
        return digest.hexdigest()

    @property
    def loss_tokens(self) -> np.ndarray:
        return np.add.reduceat(self.lengths[self.members], self.bounds[:-1])

    @property
    def groups(self) -> None:
        return None

    @property
    def filled(self) -> np.ndarray:
        return self.loss_tokens  # every filled position has a target

    @property
    def used(self) -> np.ndarray:
        return self.loss_tokens

    def has_loss(self, rows: np.ndarray, columns: slice) -> bool:
        pieces = (self.members[self.bounds[row] : self.bounds[row + 1]] for row in rows)
        return any(self.lengths[members].sum() > columns.start for members in pieces)

    def check(self, rows: np.ndarray) -> None:
        """Raises UserError if a token of these rows is not in the vocabulary. It reads them all."""
        for row in rows:
            for piece in self.members[self.bounds[row] : self.bounds[row + 1]]:
                self.documents.tokens(self.starts[piece], self.starts[piece] + self.lengths[piece] + 1)

    def take(self, rows: np.ndarray) -> Rows:
        """The rows of these indices, laid out. Raises UserError if a token is not in the vocabulary."""
        shape = len(rows), self.width
        tokens, targets = np.zeros(shape, np.int32), np.full(shape, NO_LOSS, np.int32)
        seq_start, filled = np.zeros(shape, bool), np.zeros(len(rows), np.int64)
        for i, row in enumerate(rows):
            at = 0
            for piece in self.members[self.bounds[row] : self.bounds[row + 1]]:
                first, stop = self.starts[piece], at + self.lengths[piece]
                ids = self.documents.tokens(first, first + self.lengths[piece] + 1)
                tokens[i, at:stop], targets[i, at:stop] = ids[:-1], ids[1:]
                seq_start[i, at:stop] = ids[:-1] == END
                seq_start[i, at] = True
                at = stop
            filled[i] = at
            if at < self.width:
                seq_start[i, at] = True
        return Rows(tokens, targets, seq_start, filled)


@make_rows.register
def _(
    documents: MappedDocuments, ctx_len: int, packing: bool, carry: bool = False, group_size: int | None = None
) -> tuple[MappedRows, PackReport]:
    # `carry` is not read: it says what becomes of long conversations, and plain text always goes on.
    _refuse_groups(documents, group_size)
    targets = documents.stops - documents.starts - 1
    learned = targets > 0
    if not learned.any():
        raise UserError(
            f"{documents.file.prefix}.bin: none of {len(documents)} documents has two tokens, so there is nothing to "
            "learn"
        )
    targets, begins = targets[learned], documents.starts[learned]
    # A longer document is cut into pieces of ctx_len targets, the last piece of those that are left. Each
    # piece begins with the last token of the one before.
    pieces = -(-targets // ctx_len)
    number = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)  # each piece's in its document
    starts = np.repeat(begins, pieces) + number * ctx_len
    lengths = np.minimum(np.repeat(targets, pieces) - number * ctx_len, ctx_len)

    # Pieces that fill a row come first, as they would from packing, so that only the others need to be packed.
    alone = lengths == ctx_len if packing else np.ones(len(lengths), bool)
    rest = np.flatnonzero(~alone)
    packed = pack_lengths(lengths[rest], ctx_len) if len(rest) else []
    members = [np.flatnonzero(alone), rest[np.fromiter(chain.from_iterable(packed), np.int64)]]
    held = np.concatenate([np.ones(len(members[0]), np.int64), np.fromiter(map(len, packed), np.int64)])
    width = ctx_len if packing else int(lengths.max())
    bounds = np.concatenate([[0], np.cumsum(held)])
    rows = MappedRows(documents, width, starts, lengths, np.concatenate(members), bounds)
    tokens = int(lengths.sum())
    return rows, PackReport(
        records=len(documents),
        rows=len(rows),
        width=width,
        ctx_len=ctx_len,
        longest=int(targets.max()),
        tokens=tokens,
        loss_tokens=tokens,
        lost_tokens=0,
        fill=tokens / (len(rows) * width),
        truncated=0,
        carried=0,
        dropped=int(np.count_nonzero(~learned)),
        enough_ctx_len=None,
    )
