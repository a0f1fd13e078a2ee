"""Rows of ctx_len positions, the unit of a batch: several documents packed into each, or one."""

from __future__ import annotations

import hashlib
import logging
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import singledispatch
from itertools import pairwise
from typing import Protocol

import numpy as np

from rwkv_miss.data.documents import Document
from rwkv_miss.data.fitting import cut_groups, enough_ctx_len, split_long, tolerated
from rwkv_miss.data.tokenizers import END
from rwkv_miss.errors import UserError

NO_LOSS = -100
"""The target of a position without loss (the value that torch's cross_entropy ignores)."""
NO_RECORD = -1
"""The record of a position in the padding."""

_log = logging.getLogger("rwkv_miss")


class AnyRows(Protocol):
    """What batches are made of: rows in memory (`Rows`), or rows that are laid out when they are taken."""

    def __len__(self) -> int: ...

    def fingerprint(self) -> str:
        """A SHA-256 hash (hex) that rows of the same documents in the same order have in common."""

    @property
    def width(self) -> int:
        """Positions in a row."""

    @property
    def loss_tokens(self) -> np.ndarray:
        """Targets in each row, int64 (R,)."""

    @property
    def filled(self) -> np.ndarray:
        """The positions of each row before its padding, int64 (R,)."""

    @property
    def used(self) -> np.ndarray:
        """The columns of each row up to its last target, int64 (R,)."""

    @property
    def groups(self) -> np.ndarray | None:
        """The groups in each row, int64 (R,); None if the documents are not in groups."""

    def has_loss(self, rows: np.ndarray, columns: slice) -> bool:
        """Whether any of these rows has a target in these columns."""

    def check(self, rows: np.ndarray) -> None:
        """Raises UserError if these rows cannot be taken."""

    def take(self, rows: np.ndarray) -> Rows:
        """The rows of these indices. Raises UserError as `check` does."""


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """R rows of `width` positions. A document of L tokens takes L - 1 positions in a row.

    tokens int32 (R, width): the inputs, 0 in the padding at a row's end. targets int32 (R, width): the next token, or
    `NO_LOSS`. seq_start bool (R, width): true at each document's first position and the padding's. filled int64 (R,):
    the positions of each row before its padding.

    For documents in groups, records is int32 (R, width): the number of the document, in the data's order, that a
    position belongs to, `NO_RECORD` in the padding; and groups is int64 (R,): the groups in each row. Otherwise both
    are None.
    """

    tokens: np.ndarray
    targets: np.ndarray
    seq_start: np.ndarray
    filled: np.ndarray
    records: np.ndarray | None = None
    groups: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for array in (self.tokens, self.targets, self.seq_start, self.records, self.groups):
            if array is not None:
                digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    @property
    def loss_tokens(self) -> np.ndarray:
        return np.count_nonzero(self.targets != NO_LOSS, axis=1)

    @property
    def width(self) -> int:
        return self.tokens.shape[1]

    @property
    def used(self) -> np.ndarray:
        has_loss = self.targets != NO_LOSS
        return np.where(has_loss.any(1), self.width - has_loss[:, ::-1].argmax(1), 0)

    def has_loss(self, rows: np.ndarray, columns: slice) -> bool:
        return bool((self.targets[rows, columns] != NO_LOSS).any())

    def check(self, rows: np.ndarray) -> None:
        pass  # documents in memory were checked when they were encoded

    def take(self, rows: np.ndarray) -> Rows:
        of_groups = (None if x is None else x[rows] for x in (self.records, self.groups))
        return Rows(self.tokens[rows], self.targets[rows], self.seq_start[rows], self.filled[rows], *of_groups)


@dataclass(frozen=True, slots=True)
class PackReport:
    """What became of the records.

    `width` is that of the rows, at most `ctx_len`; `longest` counts the positions of the longest record, `tokens` the
    positions taken, and `fill` is their share of all positions. `loss_tokens` counts the loss tokens in the rows,
    `lost_tokens` those that ctx_len leaves out. `truncated` counts the records that lose their end to ctx_len,
    `carried` the conversations that go on in further rows, `dropped` the records that have no loss token, or none
    left; for groups, all records of each group that is left out.

    If ctx_len loses more of the records or of the loss tokens than is `tolerated`, `enough_ctx_len` is the least one
    that does not; otherwise it is None.
    """

    records: int
    rows: int
    width: int
    ctx_len: int
    longest: int
    tokens: int
    loss_tokens: int
    lost_tokens: int
    fill: float
    truncated: int
    carried: int
    dropped: int
    enough_ctx_len: int | None

    def __str__(self) -> str:
        return (
            f"{self.records:,} records in {self.rows:,} rows of {self.width}: {self.tokens:,} tokens, "
            f"{self.loss_tokens:,} with loss, {self.fill:.1%} filled; "
            f"{self.truncated:,} truncated, {self.carried:,} carried on, {self.dropped:,} dropped, "
            f"{self.lost_tokens / max(self.loss_tokens + self.lost_tokens, 1):.1%} of the loss tokens lost"
        )

    @property
    def losses(self) -> str | None:
        """What ctx_len loses, and which would be enough; None if no more is lost than is `tolerated`."""
        if self.enough_ctx_len is None:
            return None
        return (
            f"of {self.records:,} records, {self.truncated:,} lose their ends to ctx_len {self.ctx_len} and "
            f"{self.dropped:,} have nothing left to learn, with {self.lost_tokens:,} of "
            f"{self.loss_tokens + self.lost_tokens:,} loss tokens; ctx_len {self.enough_ctx_len} would keep 99 % of "
            "the records whole and of the loss tokens"
        )


@singledispatch
def make_rows(
    documents: Sequence[Document], ctx_len: int, packing: bool, carry: bool = False, group_size: int | None = None
) -> tuple[AnyRows, PackReport]:
    """Lays documents of any length out in rows of at most ctx_len positions.

    Args:
        packing: put several documents into a row of ctx_len positions. If false every document has a row, and the rows
            are as wide as the longest of them.
        carry: what `split_long` does with conversations longer than ctx_len.
        group_size: with n, documents n * i to n * i + n - 1 are a group. The whole of it lies in one row, one document
            after the other, and the rows carry records and groups; `cut_groups` says what happens to long documents.

    Raises:
        UserError: nothing is left to learn, the documents do not make whole groups, or `carry` is given for groups.
    """
    numbers = None
    if group_size is None:
        fitted, too_long, dropped = split_long(documents, ctx_len, carry)
    elif carry:
        raise UserError("long_documents is carry, but records that are learned in groups cannot go on; give cut")
    else:
        fitted, numbers, too_long, dropped = cut_groups(documents, ctx_len, group_size)
    n = group_size or 1
    lengths = np.array([len(document.ids) - 1 for document in fitted])
    of_units = lengths.reshape(-1, n).sum(1)  # the lengths of what lies whole in one row: documents, or groups
    width = ctx_len if packing else int(of_units.max())
    units = pack_lengths(of_units, width) if packing else [[i] for i in range(len(of_units))]
    members = [[n * unit + i for unit in row for i in range(n)] for row in units]
    rows = _lay_out(fitted, members, width, numbers, n)

    tokens, loss_tokens = int(lengths.sum()), int(rows.loss_tokens.sum())
    truncated, carried = (0, too_long) if carry else (too_long, 0)
    lost_tokens = sum(int(np.count_nonzero(document.mask)) for document in documents) - loss_tokens
    is_lossy = lost_tokens > tolerated(loss_tokens + lost_tokens) or (
        lost_tokens > 0 and truncated + dropped > tolerated(len(documents))
    )
    return rows, PackReport(
        records=len(documents),
        rows=len(rows),
        width=width,
        ctx_len=ctx_len,
        longest=max(len(document.ids) - 1 for document in documents),
        tokens=tokens,
        loss_tokens=loss_tokens,
        lost_tokens=lost_tokens,
        fill=tokens / rows.tokens.size,
        truncated=truncated,
        carried=carried,
        dropped=dropped,
        enough_ctx_len=enough_ctx_len(documents, group_size) if is_lossy else None,
    )


def check_losses(report: PackReport, name: str, allow_dropping: bool) -> None:
    """Warns of what ctx_len loses of the records, and of records without loss, if that is more than is `tolerated`.

    Args:
        name: what the records are called in the message, such as their file.
        allow_dropping: warn only, however many are lost.

    Raises:
        UserError: more than half of the records are truncated or dropped, and that is not allowed.
    """
    if not (said := report.losses):
        if report.dropped > tolerated(report.records):
            _log.warning(
                "%s: %s of %s records have no token that carries loss: nothing is learned from them",
                *(name, f"{report.dropped:,}", f"{report.records:,}"),
            )
        return
    if not allow_dropping and 2 * (report.truncated + report.dropped) > report.records:
        raise UserError(f"{name}: {said}; raise ctx_len, or give --allow_dropping true to train on what is left")
    _log.warning("%s: %s", name, said)


def first_documents(rows: AnyRows, count: int) -> list[Document]:
    """The first `count` documents in the rows' order, each as far as it lies in one row, with an `END`. Those that have
    only one token there are left out."""
    found: list[Document] = []
    for number in range(len(rows)):
        row = rows.take(np.array([number]))
        bounds = [*np.flatnonzero(row.seq_start[0, : row.filled[0]]), row.filled[0]]
        for start, stop in pairwise(bounds):
            if len(found) == count:
                return found
            if stop - start > 1:
                ids = np.append(row.tokens[0, start:stop], np.int32(END))
                found.append(Document(ids, np.append(False, row.targets[0, start:stop] != NO_LOSS)))
    return found


def pad(documents: Sequence[Document], width: int) -> Rows:
    """Rows of one document each, in order. Documents have 2 to width + 1 tokens."""
    return _lay_out(documents, [[i] for i in range(len(documents))], width)


def pack(documents: Sequence[Document], ctx_len: int) -> Rows:
    """Few rows that hold all documents, each of them whole in one row. Documents have 2 to ctx_len + 1 tokens. The same
    documents are always packed in the same way."""
    lengths = np.array([len(document.ids) - 1 for document in documents])
    return _lay_out(documents, pack_lengths(lengths, ctx_len), ctx_len)


def pack_lengths(lengths: np.ndarray, ctx_len: int) -> list[list[int]]:
    """Which documents share a row: for each row the list of their indices.

    Args:
        lengths: the documents' lengths, int (documents,), from 1 to ctx_len.
    """
    # Plain best fit (1 candidate) sometimes needs fewer rows, if most documents are longer than half a row.
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
    """Bin packing: for each row a list of lengths that sum to at most ctx_len.

    Rows are filled one after the other. Each begins with the longest length that is left. Then the length that leaves
    the least space is added, again and again: of the `candidates` longest lengths that fit, each is weighed together
    with the best partner that fits beside it. With 1 candidate this is best-fit decreasing; with more it is a small
    case of the minimum bin slack heuristic (Gupta and Ho, 1999).
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
            # Candidates are weighed only if no single length fills the row but two might.
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


def _lay_out(
    documents: Sequence[Document],
    members: list[list[int]],
    width: int,
    numbers: np.ndarray | None = None,
    group_size: int = 1,
) -> Rows:
    """Rows of the documents that `members` lists for each. With `numbers`, those that the documents have in the data,
    the rows carry records and groups, of `group_size` documents each."""
    shape = len(members), width
    tokens = np.zeros(shape, dtype=np.int32)
    targets = np.full(shape, NO_LOSS, dtype=np.int32)
    seq_start = np.zeros(shape, dtype=bool)
    filled = np.zeros(len(members), dtype=np.int64)
    records = groups = None
    if numbers is not None:
        records = np.full(shape, NO_RECORD, dtype=np.int32)
        groups = np.array([len(member) // group_size for member in members], dtype=np.int64)
    for row, member in enumerate(members):
        start = 0
        for i in member:
            ids, mask = documents[i].ids, documents[i].mask
            stop = start + len(ids) - 1
            assert start < stop <= width
            tokens[row, start:stop] = ids[:-1]
            np.copyto(targets[row, start:stop], ids[1:], where=mask[1:])
            seq_start[row, start] = True
            if records is not None and numbers is not None:
                records[row, start:stop] = numbers[i]
            start = stop
        filled[row] = start
        if start < width:
            seq_start[row, start] = True
    return Rows(tokens, targets, seq_start, filled, records, groups)
