"""Fitting documents to a context length: which are cut or left out, and which context length would be enough."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rwkv_miss.data.documents import Document, count_groups
from rwkv_miss.errors import UserError


def split_long(documents: Sequence[Document], ctx_len: int, carry: bool = False) -> tuple[list[Document], int, int]:
    """Fits documents to ctx_len (input, target) positions, that is ctx_len + 1 tokens.

    Longer plain text is split into pieces of which each begins with the last token of the one before, so that every
    target is learned once. Other longer documents are truncated at the end, or with `carry` split as well; pieces
    without a loss token are left out. A document that has no loss token, or none left, is dropped.

    Returns:
        The fitted documents; the number of documents, plain text aside, that were truncated or split; and the number
        dropped.

    Raises:
        UserError: every document would be dropped.
    """
    assert ctx_len >= 1
    fitted = []
    too_long = dropped = 0
    for document in documents:
        length = len(document.ids)
        stop = length if document.is_text or carry else min(length, ctx_len + 1)
        pieces = [document.piece(i, i + ctx_len + 1) for i in range(0, stop - 1, ctx_len)]
        pieces = [piece for piece in pieces if piece.mask.any()]
        fitted += pieces
        if not pieces:
            dropped += 1
        elif length > ctx_len + 1 and not document.is_text:
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


def cut_groups(
    documents: Sequence[Document], ctx_len: int, group_size: int
) -> tuple[list[Document], np.ndarray, int, int]:
    """Fits groups of `group_size` consecutive documents to rows of ctx_len positions.

    Every document has an equal share of a row, ctx_len // group_size positions; longer ones, plain text too, are
    truncated at the end. A group is dropped whole if one of its documents has no loss token, or none left.

    Returns:
        The fitted documents, group by group; the index that each had in `documents`, int64 (fitted,); how many of
        them were truncated; and the number of documents dropped.

    Raises:
        UserError: the documents do not make whole groups, a share is empty, or every group would be dropped.
    """
    n_groups = count_groups(len(documents), group_size)
    share = ctx_len // group_size
    if share < 1:
        raise UserError(f"ctx_len {ctx_len} is too short for groups of {group_size} records; raise it")
    fitted: list[Document] = []
    numbers: list[int] = []
    truncated = 0
    for first in range(0, len(documents), group_size):
        members = documents[first : first + group_size]
        cut = [document.piece(0, share + 1) for document in members]
        if all(document.mask.any() for document in cut):
            fitted += cut
            numbers += range(first, first + group_size)
            truncated += sum(len(document.ids) > share + 1 for document in members)
    if not fitted:
        groups = (documents[i : i + group_size] for i in range(0, len(documents), group_size))
        needed = [max(int(np.argmax(d.mask)) for d in group) for group in groups if all(d.mask.any() for d in group)]
        if not needed:
            raise UserError(f"in each of the {n_groups:,} groups a record has no token that carries loss")
        raise UserError(
            f"ctx_len {ctx_len} is too short: in each of the {n_groups:,} groups of {group_size} records it cuts off "
            f"every loss token of one of them; it must be at least {group_size * min(needed)}"
        )
    return fitted, np.array(numbers), truncated, len(documents) - len(fitted)


def tolerated(count: int) -> int:
    """How many of `count` records or loss tokens a context length may lose without a warning: 1 %."""
    return count // 100


def enough_ctx_len(documents: Sequence[Document], group_size: int | None = None) -> int:
    """The least ctx_len at which `split_long` (with carry false) or `cut_groups` truncate or drop no more documents
    than are `tolerated`, and lose no more loss tokens. Documents that are dropped at any ctx_len do not count."""
    n = group_size or 1
    # whole[i]: the least ctx_len at which document i is whole. tokens[c]: the loss tokens of which c is the least
    # ctx_len that keeps them.
    whole = np.ones(len(documents), np.int64)
    tokens = np.zeros(n * max(len(document.ids) for document in documents) + 1, np.int64)
    for first in range(0, len(documents), n):
        group = documents[first : first + n]
        if not all(document.mask.any() for document in group):
            continue
        if group_size is None and group[0].is_text:
            tokens[1] += np.count_nonzero(group[0].mask)
            continue
        kept = n * max(int(np.argmax(document.mask)) for document in group)  # below it the group is dropped
        for i, document in enumerate(group, start=first):
            whole[i] = max(n * (len(document.ids) - 1), kept)
            np.add.at(tokens, np.maximum(n * np.flatnonzero(document.mask), kept), 1)
    enough_documents = np.sort(whole)[len(whole) - 1 - tolerated(len(whole))]
    kept_tokens = np.cumsum(tokens)
    enough_tokens = np.searchsorted(kept_tokens, kept_tokens[-1] - tolerated(int(kept_tokens[-1])))
    return int(max(enough_documents, enough_tokens))
