"""How much of what a run computes is documents, and how much is padding."""

from __future__ import annotations

import numpy as np

# Below this share more is computed for padding than for documents.
_TOO_EMPTY = 0.5


def fill_of_batches(filled: np.ndarray, used: np.ndarray, rows_together: int) -> float:
    """The share of the computed positions that holds documents where rows are not packed: of `rows_together` rows that
    are drawn together, none is computed beyond the longest.

    Args:
        filled: the positions of each row before its padding, int64 (rows,).
        used: those up to its last target, at most as many, int64 (rows,).
    """
    order = np.random.Generator(np.random.PCG64(0)).permutation(len(used))
    filled, used = filled[order], used[order]
    starts = np.arange(0, len(used), rows_together)
    widths = np.maximum.reduceat(used, starts).repeat(rows_together)[: len(used)]
    return float(np.minimum(filled, widths).sum() / widths.sum())


def too_empty(fill: float, packing: bool) -> str | None:
    """What there is to say of rows that are less than half full; None of others."""
    if fill >= _TOO_EMPTY:
        return None
    if packing:
        return f"all records together fill {fill:.1%} of the rows, the rest is padding; lower ctx_len"
    return (
        f"the documents fill {fill:.1%} of the rows, the rest is padding, since each document has a row for itself and "
        "packing is off; leave --packing false out"
    )
