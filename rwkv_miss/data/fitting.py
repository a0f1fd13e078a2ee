"""Fitting documents to a context length: which are cut or left out, and which context length would be enough."""

from __future__ import annotations

import numpy as np

from rwkv_miss.data.documents import Documents, count_groups, count_learned
from rwkv_miss.data.rows import Pieces
from rwkv_miss.errors import UserError


def split_long(documents: Documents, ctx_len: int, carry: bool = False) -> tuple[Pieces, int, int]:
    """Fits documents to ctx_len (input, target) positions, that is ctx_len + 1 tokens.

    Longer plain text is split into pieces of which each begins with the last token of the one before, so that every
    target is learned once. Other longer documents are truncated at the end, or with `carry` split as well; pieces
    without a loss token are left out. A document that has no loss token, or none left, is dropped.

    Returns:
        The pieces, in the documents' order; the number of documents, plain text aside, that were truncated or split;
        and the number dropped.

    Raises:
        UserError: every document would be dropped.
    """
    assert ctx_len >= 1
    targets, learned = documents.targets, documents.learned
    is_text = learned == targets
    kept = targets if carry else np.where(is_text, targets, np.minimum(targets, ctx_len))
    counts = -(-kept // ctx_len)
    records = np.repeat(np.arange(len(documents)), counts)
    offsets = ctx_len * (np.arange(len(records)) - np.repeat(np.cumsum(counts) - counts, counts))
    starts, lengths = documents.starts[records] + offsets, np.minimum(kept[records] - offsets, ctx_len)
    has_loss = count_learned(documents.store, starts, lengths) > 0
    is_kept = np.zeros(len(documents), dtype=bool)
    is_kept[records[has_loss]] = True
    if not is_kept.any():
        if not learned.any():
            raise UserError(
                f"{documents.store.name}: none of the {len(documents)} records has a token that carries loss"
            )
        needed = _first_learned(documents)[learned > 0].min()
        raise UserError(
            f"ctx_len {ctx_len} is too short: it cuts off every answer of the {len(documents)} records; "
            f"the first answer token needs a ctx_len of at least {needed}"
        )
    too_long = int(np.count_nonzero(is_kept & ~is_text & (targets > ctx_len)))
    pieces = Pieces(starts[has_loss], lengths[has_loss], None)
    return pieces, too_long, int(np.count_nonzero(~is_kept))


def cut_groups(documents: Documents, ctx_len: int, group_size: int) -> tuple[Pieces, int, int]:
    """Fits groups of `group_size` consecutive documents to rows of ctx_len positions.

    Every document has an equal share of a row, ctx_len // group_size positions; longer ones, plain text too, are
    truncated at the end. A group is dropped whole if one of its documents has no loss token, or none left.

    Returns:
        The pieces, group by group; how many documents were truncated; and the number of documents dropped.

    Raises:
        UserError: the documents do not make whole groups, a share is empty, or every group would be dropped.
    """
    n_groups = count_groups(len(documents), group_size)
    share = ctx_len // group_size
    if share < 1:
        raise UserError(f"ctx_len {ctx_len} is too short for groups of {group_size} records; raise it")
    lengths = np.minimum(documents.targets, share)
    has_loss = count_learned(documents.store, documents.starts, lengths) > 0
    is_kept = np.repeat(has_loss.reshape(n_groups, group_size).all(1), group_size)
    if not is_kept.any():
        learnable = (documents.learned > 0).reshape(n_groups, group_size).all(1)
        if not learnable.any():
            raise UserError(f"in each of the {n_groups:,} groups a record has no token that carries loss")
        needed = _first_learned(documents).reshape(n_groups, group_size).max(1)[learnable].min()
        raise UserError(
            f"ctx_len {ctx_len} is too short: in each of the {n_groups:,} groups of {group_size} records it cuts off "
            f"every loss token of one of them; it must be at least {group_size * needed}"
        )
    pieces = Pieces(documents.starts, lengths, np.arange(len(documents))).take(is_kept)
    truncated = int(np.count_nonzero(is_kept & (documents.targets > share)))
    return pieces, truncated, len(documents) - len(pieces)


def tolerated(count: int) -> int:
    """How many of `count` records or loss tokens a context length may lose without a warning: 1 %."""
    return count // 100


def enough_ctx_len(documents: Documents, group_size: int | None = None) -> int:
    """The least ctx_len at which `split_long` (with carry false) or `cut_groups` truncate or drop no more documents
    than are `tolerated`, and lose no more loss tokens. Documents that are dropped at any ctx_len do not count."""
    n = group_size or 1
    targets, learned = documents.targets, documents.learned
    counts = (learned > 0).reshape(-1, n).all(1).repeat(n)
    is_cut = counts & ((learned < targets) | (group_size is not None))  # plain text goes on, unless it is in a group
    # Below n * kept a document's group is dropped.
    kept = np.where(counts, _first_learned(documents), 1).reshape(-1, n).max(1).repeat(n)
    whole = np.where(is_cut, n * np.maximum(targets, kept), 1)
    enough_documents = np.sort(whole)[len(whole) - 1 - tolerated(len(whole))]

    # at[i]: how many loss tokens are kept from n * i on, as a sum of what it grows by at each i and where that ends.
    at, grows = np.zeros(int(targets.max()) + 2, np.int64), np.zeros(int(targets.max()) + 2, np.int64)
    at[1] = learned[counts & ~is_cut].sum()
    first, stop, kept = _stretches(documents, is_cut, kept)
    np.add.at(at, kept, np.clip(kept - first, 0, stop - first))
    np.add.at(grows, np.clip(kept, first, stop), 1)
    np.add.at(grows, stop, -1)
    kept_tokens = np.cumsum(at + np.cumsum(grows))
    enough_tokens = np.searchsorted(kept_tokens, kept_tokens[-1] - tolerated(int(kept_tokens[-1])))
    return int(max(enough_documents, n * enough_tokens))


def _stretches(
    documents: Documents, chosen: np.ndarray, values: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The stretches of tokens with loss in the chosen documents: where each begins and ends in its document, and what
    `values` has for that document."""
    edges, starts, stops = documents.store.edges, documents.starts[chosen], documents.stops[chosen]
    first = np.searchsorted(edges[1::2], starts + 1, side="right")
    counts = np.searchsorted(edges[::2], stops) - first
    numbers = np.arange(counts.sum()) + np.repeat(first - (np.cumsum(counts) - counts), counts)
    of = np.repeat(np.arange(len(starts)), counts)
    begins = np.maximum(edges[2 * numbers], starts[of] + 1) - starts[of]
    ends = np.minimum(edges[2 * numbers + 1], stops[of]) - starts[of]
    return begins, ends, values[chosen][of]


def _first_learned(documents: Documents) -> np.ndarray:
    """The least ctx_len that keeps a loss token of each document, int64 (documents,); of no use where there is none."""
    return documents.store.next_learned(documents.starts + 1) - documents.starts
