"""Rows, the unit of a batch: where in a store the pieces of each row are, and rows laid out as arrays, which they are
when they are asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from rwkv_miss.data.documents import count_learned
from rwkv_miss.data.store import Store
from rwkv_miss.data.tokenizers import END

NO_LOSS = -100
"""The target of a position without loss (the value that torch's cross_entropy ignores)."""
NO_RECORD = -1
"""The record of a position in the padding."""


@dataclass(frozen=True, slots=True, eq=False)
class Pieces:
    """Parts of documents: piece i has the inputs ids[starts[i]:starts[i] + lengths[i]] of a store and, one position
    further, the targets. records: the number of each piece's document, None where it is of no interest. All are int64
    (pieces,)."""

    starts: np.ndarray
    lengths: np.ndarray
    records: np.ndarray | None

    def __len__(self) -> int:
        return len(self.starts)

    def take(self, chosen: np.ndarray | slice) -> Pieces:
        records = None if self.records is None else self.records[chosen]
        return Pieces(self.starts[chosen], self.lengths[chosen], records)


@dataclass(frozen=True, slots=True, eq=False)
class LaidOut:
    """R rows of `width` positions as arrays.

    tokens int32 (R, width): the inputs, 0 in the padding at a row's end. targets int32 (R, width): the next token, or
    `NO_LOSS`. seq_start bool (R, width): true where a document begins, and the padding.

    For documents in groups, records is int32 (R, width): the number of the document, in the data's order, that a
    position belongs to, `NO_RECORD` in the padding. Otherwise it is None.
    """

    tokens: np.ndarray
    targets: np.ndarray
    seq_start: np.ndarray
    records: np.ndarray | None


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """R rows of at most `width` positions: row i holds the pieces from bounds[i] up to bounds[i + 1].

    stores: of each source. firsts int64 (sources + 1,): rows from firsts[i] up to firsts[i + 1] are of stores[i]. turns
    int64 (sources,): how many rows of each source come in an epoch. pieces: of all rows, one row after the other.
    group_size: with n, each n of the pieces are the documents of a group, and they have records. Of each row, int64
    (R,): loss_tokens, its targets; filled, its positions before the padding.
    """

    stores: tuple[Store, ...]
    firsts: np.ndarray
    turns: np.ndarray
    width: int
    pieces: Pieces
    bounds: np.ndarray
    group_size: int | None
    loss_tokens: np.ndarray
    filled: np.ndarray

    def __len__(self) -> int:
        return len(self.filled)

    @property
    def epoch_size(self) -> int:
        """How many rows come in an epoch."""
        return int(self.turns.sum())

    @property
    def groups(self) -> np.ndarray | None:
        """The groups in each row, int64 (R,); None if the documents are not in groups."""
        return np.diff(self.bounds) // self.group_size if self.group_size else None

    @property
    def used(self) -> np.ndarray:
        """The columns of each row up to its last target, int64 (R,)."""
        p, ends = self.pieces, np.cumsum(self.pieces.lengths)
        columns = ends - p.lengths - np.repeat(np.cumsum(self.filled) - self.filled, np.diff(self.bounds))
        of_stores = self._stores_pieces()
        last = [store.last_learned(some.starts + 1 + some.lengths) - some.starts for store, some in of_stores]
        in_pieces = np.concatenate(last)  # the columns of each piece up to its last target; below 1 there is none
        return np.maximum.reduceat(np.where(in_pieces > 0, columns + in_pieces, 0), self.bounds[:-1])

    def fingerprint(self) -> str:
        """A SHA-256 hash (hex) that rows of the same tokens in the same order have in common. Of a store without a mark
        17 evenly spaced tokens of up to 1,024 pieces count."""
        digest = hashlib.sha256(repr((self.width, self.group_size)).encode())
        for array in (self.firsts, self.turns, self.bounds, self.pieces.starts, self.pieces.lengths):
            digest.update(np.ascontiguousarray(array).data)
        for store, pieces in self._stores_pieces():
            if store.mark is not None:
                digest.update(store.mark.encode())
                continue
            sample = pieces.take(np.unique(np.linspace(0, len(pieces) - 1, 1024).astype(np.int64)))
            places = sample.starts + sample.lengths * np.arange(17)[:, None] // 16
            digest.update(np.ascontiguousarray(store.ids[places]).data)
        return digest.hexdigest()

    def has_loss(self, rows: np.ndarray, columns: slice) -> bool:
        """Whether any of these rows has a target in these columns."""
        for row in rows:
            store, pieces = self._row(row)
            begins = np.cumsum(pieces.lengths) - pieces.lengths
            first, last = (np.clip(at - begins, 0, pieces.lengths) for at in (columns.start, columns.stop))
            if count_learned(store, pieces.starts + first, last - first).any():
                return True
        return False

    def check(self, rows: np.ndarray) -> None:
        """Raises UserError if these rows cannot be taken. It reads what was not checked before."""
        for row in rows:
            store, pieces = self._row(row)
            if store.vocab_size is not None:
                for start, length in zip(pieces.starts, pieces.lengths, strict=True):
                    store.read(start, start + length + 1)

    def take(self, rows: np.ndarray) -> LaidOut:
        """The rows of these indices. An `END` inside a document begins another one.

        Raises:
            UserError: a token is not in the model's vocabulary.
        """
        shape = len(rows), self.width
        tokens, targets = np.zeros(shape, np.int32), np.full(shape, NO_LOSS, np.int32)
        seq_start = np.zeros(shape, bool)
        records = np.full(shape, NO_RECORD, np.int32) if self.group_size else None
        for i, row in enumerate(rows):
            store, pieces = self._row(row)
            at = 0
            for k, (start, length) in enumerate(zip(pieces.starts, pieces.lengths, strict=True)):
                place = slice(at, at := at + length)
                ids = store.read(start, start + length + 1)
                tokens[i, place] = ids[:-1]
                np.copyto(targets[i, place], ids[1:], where=store.mask(start + 1, start + length + 1))
                seq_start[i, place] = ids[:-1] == END
                seq_start[i, place.start] = True
                if records is not None and pieces.records is not None:
                    records[i, place] = pieces.records[k]
            if at < self.width:
                seq_start[i, at] = True
        return LaidOut(tokens, targets, seq_start, records)

    def _stores_pieces(self) -> Iterator[tuple[Store, Pieces]]:
        ends = self.bounds[self.firsts]
        for store, first, end in zip(self.stores, ends[:-1], ends[1:], strict=True):
            yield store, self.pieces.take(slice(first, end))

    def _row(self, row: int) -> tuple[Store, Pieces]:
        store = self.stores[np.searchsorted(self.firsts, row, side="right") - 1]
        return store, self.pieces.take(slice(self.bounds[row], self.bounds[row + 1]))


def rows_of(store: Store, pieces: Pieces, bounds: np.ndarray, width: int, group_size: int | None) -> Rows:
    """Rows of one source. Each holds at least one piece."""
    return Rows(
        (store,),
        np.array([0, len(bounds) - 1]),
        np.array([len(bounds) - 1]),
        width,
        pieces,
        bounds,
        group_size,
        loss_tokens=np.add.reduceat(count_learned(store, pieces.starts, pieces.lengths), bounds[:-1]),
        filled=np.add.reduceat(pieces.lengths, bounds[:-1]),
    )


def mix(sources: Sequence[Rows], weights: Sequence[float]) -> Rows:
    """The rows of several sources, one source behind the other. Their records are numbered through.

    Args:
        weights: how often the rows of each source come in an epoch, above 0. The number of rows that come is a whole
            one, and at least 1.
    """
    n = sources[0].group_size
    turns = [max(1, round(len(rows) * weight)) for rows, weight in zip(sources, weights, strict=True)]
    if len(sources) == 1:
        return replace(sources[0], turns=np.array(turns))
    pieces = [rows.pieces for rows in sources]
    first_pieces = np.cumsum([0, *map(len, pieces)])
    records = None
    if n:
        first_records = np.cumsum([0, *(n * -(-rows.stores[0].documents // n) for rows in sources)])
        records = np.concatenate([p.records + first for p, first in zip(pieces, first_records, strict=False)])
    return Rows(
        stores=tuple(store for rows in sources for store in rows.stores),
        firsts=np.cumsum([0, *map(len, sources)]),
        turns=np.array(turns),
        width=max(rows.width for rows in sources),
        pieces=Pieces(np.concatenate([p.starts for p in pieces]), np.concatenate([p.lengths for p in pieces]), records),
        bounds=np.concatenate(
            [[0], *(rows.bounds[1:] + first for rows, first in zip(sources, first_pieces, strict=False))]
        ),
        group_size=n,
        loss_tokens=np.concatenate([rows.loss_tokens for rows in sources]),
        filled=np.concatenate([rows.filled for rows in sources]),
    )


def epoch_rows(rows: Rows, seed: int, epoch: int) -> np.ndarray:
    """The rows that come in an epoch, ascending, int64 (rows.epoch_size,).

    The rows of each source come in turn, in an order of their own that `seed` draws, and an epoch goes on where the
    one before it stopped: over any number of epochs two rows of a source have come equally often, but for one.
    """
    found = []
    for source, (first, count, turns) in enumerate(zip(rows.firsts, np.diff(rows.firsts), rows.turns, strict=False)):
        order = np.random.Generator(np.random.PCG64([seed, 0, source])).permutation(count)
        found.append(first + np.sort(order[np.arange(epoch * turns, (epoch + 1) * turns) % count]))
    return np.concatenate(found)
