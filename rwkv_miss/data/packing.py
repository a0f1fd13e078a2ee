"""Packing: which pieces of documents share a row, and what became of the records."""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from rwkv_miss.data.documents import Document, gather
from rwkv_miss.data.fitting import cut_groups, enough_ctx_len, split_long, tolerated
from rwkv_miss.data.rows import NO_LOSS, Rows, rows_of
from rwkv_miss.data.tokenizers import END
from rwkv_miss.errors import UserError

_log = logging.getLogger("rwkv_miss")


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


def make_rows(
    documents: Sequence[Document], ctx_len: int, packing: bool, carry: bool = False, group_size: int | None = None
) -> tuple[Rows, PackReport]:
    """Distributes documents of any length over rows of at most ctx_len positions.

    Args:
        packing: put several documents into a row of ctx_len positions. If false every document has a row, and the rows
            are as wide as the longest of them.
        carry: what `split_long` does with conversations longer than ctx_len.
        group_size: with n, documents n * i to n * i + n - 1 are a group. The whole of it lies in one row, one document
            after the other, and the rows carry records and groups; `cut_groups` says what happens to long documents.

    Raises:
        UserError: nothing is left to learn, the documents do not make whole groups, or `carry` is given for groups.
    """
    documents = gather(documents)
    if group_size is None:
        pieces, too_long, dropped = split_long(documents, ctx_len, carry)
    elif carry:
        raise UserError("long_documents is carry, but records that are learned in groups cannot go on; give cut")
    else:
        pieces, too_long, dropped = cut_groups(documents, ctx_len, group_size)
    n = group_size or 1
    of_units = pieces.lengths.reshape(-1, n).sum(1)  # the lengths of what lies whole in one row: pieces, or groups
    width = ctx_len if packing else int(of_units.max())
    units, bounds = pack(of_units, width) if packing else (np.arange(len(of_units)), np.arange(len(of_units) + 1))
    members = (n * units[:, None] + np.arange(n)).ravel()
    rows = rows_of(documents.store, pieces.take(members), n * bounds, width, group_size)

    tokens, loss_tokens = int(pieces.lengths.sum()), int(rows.loss_tokens.sum())
    truncated, carried = (0, too_long) if carry else (too_long, 0)
    lost_tokens = int(documents.learned.sum()) - loss_tokens
    is_lossy = lost_tokens > tolerated(loss_tokens + lost_tokens) or (
        lost_tokens > 0 and truncated + dropped > tolerated(len(documents))
    )
    return rows, PackReport(
        records=len(documents),
        rows=len(rows),
        width=width,
        ctx_len=ctx_len,
        longest=int(documents.targets.max()),
        tokens=tokens,
        loss_tokens=loss_tokens,
        lost_tokens=lost_tokens,
        fill=tokens / (len(rows) * width),
        truncated=truncated,
        carried=carried,
        dropped=dropped,
        enough_ctx_len=enough_ctx_len(documents, group_size) if is_lossy else None,
    )


def join_reports(reports: Sequence[PackReport]) -> PackReport:
    """One report of several sources, whose rows have the same ctx_len."""
    if len(reports) == 1:
        return reports[0]

    def total(name: str) -> int:
        return sum(getattr(report, name) for report in reports)

    width = max(report.width for report in reports)
    enough = [report.enough_ctx_len for report in reports if report.enough_ctx_len is not None]
    return PackReport(
        records=total("records"),
        rows=total("rows"),
        width=width,
        ctx_len=reports[0].ctx_len,
        longest=max(report.longest for report in reports),
        tokens=total("tokens"),
        loss_tokens=total("loss_tokens"),
        lost_tokens=total("lost_tokens"),
        fill=total("tokens") / (total("rows") * width),
        truncated=total("truncated"),
        carried=total("carried"),
        dropped=total("dropped"),
        enough_ctx_len=max(enough, default=None),
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


def first_documents(rows: Rows, count: int) -> list[Document]:
    """The first `count` documents in the rows' order, each as far as it lies in one row, with an `END`. Those that have
    only one token there are left out."""
    found: list[Document] = []
    for number in range(len(rows)):
        row = rows.take(np.array([number]))
        filled = rows.filled[number]
        for start, stop in pairwise([*np.flatnonzero(row.seq_start[0, :filled]), filled]):
            if len(found) == count:
                return found
            if stop - start > 1:
                ids = np.append(row.tokens[0, start:stop], np.int32(END))
                found.append(Document(ids, np.append(False, row.targets[0, start:stop] != NO_LOSS)))
    return found


def pack(lengths: np.ndarray, ctx_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Few rows that hold everything, each thing whole in one row. The same lengths are always packed in the same way.

    Args:
        lengths: int64 (things,), from 1 to ctx_len.

    Returns:
        The things in the order of the rows, int64 (things,), and where each row begins and ends among them, int64
        (rows + 1,).
    """
    # Plain best fit (1 candidate) sometimes needs fewer rows, if most things are longer than half a row.
    found = (_pack(lengths, ctx_len, candidates) for candidates in (64, 1))
    patterns = min(found, key=lambda patterns: sum(times for _, times in patterns))
    in_rows = np.concatenate([np.tile(np.array(row), times) for row, times in patterns])
    sizes = np.repeat([len(row) for row, _ in patterns], [times for _, times in patterns])
    order = np.empty(len(lengths), np.int64)
    order[np.argsort(in_rows, kind="stable")] = np.argsort(lengths, kind="stable")  # of a length, the first comes first
    return order, np.concatenate([[0], np.cumsum(sizes)])


def _pack(lengths: np.ndarray, ctx_len: int, candidates: int) -> list[tuple[list[int], int]]:
    """Bin packing: lengths that sum to at most ctx_len, with the number of rows in turn that hold such.

    Rows are filled one after the other. Each begins with the longest length that is left. Then the length that leaves
    the least space is added, again and again: of the `candidates` longest lengths that fit, each is weighed together
    with the best partner that fits beside it. With 1 candidate this is best-fit decreasing; with more it is a small
    case of the minimum bin slack heuristic (Gupta and Ho, 1999).

    A row depends on which lengths are left, not on how many of each: it is repeated for as long as none runs out.
    """
    count = np.bincount(lengths, minlength=ctx_len + 1).tolist()
    left = [length for length in range(1, ctx_len + 1) if count[length]]  # the distinct lengths left, ascending
    patterns = []
    while left:
        row: list[int] = []
        distinct = len(left)
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
        times = 1
        if len(left) == distinct:
            again = min((count[length] - 1) // row.count(length) for length in set(row))
            for length in row:
                count[length] -= again
            times += again
        patterns.append((row, times))
    return patterns
