"""Rows of ctx_len positions, the unit of a batch: several documents packed into each, or one."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from functools import singledispatch

import numpy as np

from rwkv_miss.data.documents import Document, split_long

NO_LOSS = -100
"""The target of a position without loss (the value that torch's cross_entropy ignores)."""


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """R rows of ctx_len positions. A document of L tokens takes L - 1 positions in a row.

    tokens int32 (R, ctx_len): the inputs, 0 in the padding at a row's end. targets int32 (R, ctx_len): the next
    token, or `NO_LOSS`. seq_start bool (R, ctx_len): true at each document's first position and the padding's.
    """

    tokens: np.ndarray
    targets: np.ndarray
    seq_start: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def loss_tokens(self) -> np.ndarray:
        """Targets in each row, int64 (R,)."""
        return np.count_nonzero(self.targets != NO_LOSS, axis=1)

    @property
    def width(self) -> int:
        return self.tokens.shape[1]

    @property
    def used(self) -> np.ndarray:
        """Of each row, the columns up to its last target, int64 (R,)."""
        has_loss = self.targets != NO_LOSS
        return np.where(has_loss.any(1), self.width - has_loss[:, ::-1].argmax(1), 0)

    def has_loss(self, rows: np.ndarray, columns: slice) -> bool:
        """Whether any of these rows has a target in these columns."""
        return bool((self.targets[rows, columns] != NO_LOSS).any())

    def take(self, rows: np.ndarray) -> Rows:
        """The rows of these numbers."""
        return Rows(self.tokens[rows], self.targets[rows], self.seq_start[rows])


@dataclass(frozen=True, slots=True)
class PackReport:
    """What became of the records. `tokens` counts the positions taken, `fill` their share of all positions;
    `longest` those of the longest record; `truncated` and `carried` the conversations longer than ctx_len."""

    records: int
    rows: int
    ctx_len: int
    longest: int
    tokens: int
    loss_tokens: int
    fill: float
    truncated: int
    carried: int
    dropped: int

    def __str__(self) -> str:
        return (
            f"{self.records:,} records in {self.rows:,} rows of {self.ctx_len}: {self.tokens:,} tokens, "
            f"{self.loss_tokens:,} with loss, {self.fill:.1%} filled; "
            f"{self.truncated:,} truncated, {self.carried:,} carried on, {self.dropped:,} dropped"
        )


@singledispatch
def make_rows(documents: list[Document], ctx_len: int, packing: bool, carry: bool = False) -> tuple[Rows, PackReport]:
    """Documents of any length as rows: `split_long`, then `pack` or (packing false) `pad`, with their errors. Rows
    that are not packed are no wider than the longest document."""
    fitted, too_long, dropped = split_long(documents, ctx_len, carry)
    lengths = [len(document.ids) - 1 for document in fitted]
    rows = pack(fitted, ctx_len) if packing else pad(fitted, max(lengths))
    tokens = sum(lengths)
    return rows, PackReport(
        records=len(documents),
        rows=len(rows),
        ctx_len=rows.width,
        longest=max(len(document.ids) - 1 for document in documents),
        tokens=tokens,
        loss_tokens=int(rows.loss_tokens.sum()),
        fill=tokens / rows.tokens.size,
        truncated=0 if carry else too_long,
        carried=too_long if carry else 0,
        dropped=dropped,
    )


def pad(documents: list[Document], ctx_len: int) -> Rows:
    """One document a row, in order. Documents have 2 to ctx_len + 1 tokens."""
    return _lay_out(documents, [[i] for i in range(len(documents))], ctx_len)


def pack(documents: list[Document], ctx_len: int) -> Rows:
    """Documents of 2 to ctx_len + 1 tokens packed into few rows, each whole in one row. Deterministic."""
    lengths = np.array([len(document.ids) - 1 for document in documents])
    return _lay_out(documents, pack_lengths(lengths, ctx_len), ctx_len)


def pack_lengths(lengths: np.ndarray, ctx_len: int) -> list[list[int]]:
    """Which documents share a row, each row a list of their numbers: `lengths` (documents,) from 1 to ctx_len."""
    # Plain best fit is now and then the better of the two where most documents are longer than half a row.
    packed = min((_pack_lengths(lengths, ctx_len, candidates) for candidates in (64, 1)), key=len)
    by_length = np.argsort(lengths, kind="stable")
    first = np.searchsorted(lengths[by_length], np.arange(ctx_len + 1)).tolist()
    members = []
    for row in packed:
        member = []
        for length in row:
            member.append(int(by_length[first[length]]))
            first[length] += 1
        members.append(member)
    return members


def _pack_lengths(lengths: np.ndarray, ctx_len: int, candidates: int) -> list[list[int]]:
    """Bin packing: rows of lengths that sum to at most ctx_len.

    Row by row: begin with the longest left, then add the length that leaves the least space, looking at the
    `candidates` longest that fit, each together with the best partner that fits beside it. With 1 candidate this
    is best-fit decreasing; with more, a small case of the minimum bin slack heuristic (Gupta and Ho, 1999).
    """
    count = np.bincount(lengths, minlength=ctx_len + 1).tolist()
    left = [length for length in range(1, ctx_len + 1) if count[length]]  # the distinct lengths left, ascending
    rows = []
    while left:
        row: list[int] = []
        space = ctx_len
        while left and left[0] <= space:
            longest = bisect_right(left, space) - 1
            at = longest
            # Weigh them only where no single length fills the row but two more might.
            if row and left[longest] < space <= 2 * left[-1]:
                least = space - left[longest]
                for i in range(longest, max(longest - candidates, -1), -1):
                    rest = space - left[i]
                    partner = bisect_right(left, rest) - 1
                    slack = rest - left[partner] if partner >= 0 else rest
                    if slack < least:
                        at, least = i, slack
                        if slack == 0:
                            break
            length = left[at]
            row.append(length)
            space -= length
            count[length] -= 1
            if count[length] == 0:
                del left[at]
        rows.append(row)
    return rows


def _lay_out(documents: list[Document], members: list[list[int]], ctx_len: int) -> Rows:
    tokens = np.zeros((len(members), ctx_len), dtype=np.int32)
    targets = np.full((len(members), ctx_len), NO_LOSS, dtype=np.int32)
    seq_start = np.zeros((len(members), ctx_len), dtype=bool)
    for row, member in enumerate(members):
        start = 0
        for i in member:
            ids, mask = documents[i].ids, documents[i].mask
            stop = start + len(ids) - 1
            assert start < stop <= ctx_len
            tokens[row, start:stop] = ids[:-1]
            np.copyto(targets[row, start:stop], ids[1:], where=mask[1:])
            seq_start[row, start] = True
            start = stop
        if start < ctx_len:
            seq_start[row, start] = True
    return Rows(tokens, targets, seq_start)
