"""What becomes of documents at several context lengths."""

from __future__ import annotations

from array import array
from collections.abc import Iterable

import numpy as np

from rwkv_miss.data.documents import Document
from rwkv_miss.data.filling import fill_of_batches
from rwkv_miss.data.packing import pack
from rwkv_miss.previewing.found import AtLength

# The powers of two that are tried as ctx_len.
_LEAST, _MOST = 7, 20


def lengths_to_try(ctx_len: int) -> list[int]:
    """`ctx_len` and the powers of two around it, ascending."""
    return sorted({2**power for power in range(_LEAST, _MOST + 1)} | {ctx_len})


def pieces(document: Document, ctx_len: int, carry: bool) -> np.ndarray:
    """The positions of the pieces that `split_long` makes of the document, int64 (pieces,)."""
    length = len(document.ids) - 1
    stop = length if carry or document.is_text else min(length, ctx_len)
    learned = np.flatnonzero(document.mask[1 : stop + 1])
    return np.minimum(ctx_len, stop - ctx_len * np.unique(learned // ctx_len))


class Fitted:
    """The documents that were taken, at one ctx_len."""

    def __init__(self, ctx_len: int, carry: bool) -> None:
        self.ctx_len, self._carry = ctx_len, carry
        self._pieces = array("q")
        self._truncated = self._carried = self._dropped = self._lost = 0

    def take(self, document: Document, length: int, loss_tokens: int) -> None:
        """The next document, of so many positions, of which so many have loss."""
        if length <= self.ctx_len and loss_tokens:
            self._pieces.append(length)
            return
        found = pieces(document, self.ctx_len, self._carry)
        self._pieces.extend(found.tolist())
        if not len(found):
            self._dropped += 1
            self._lost += loss_tokens
        elif self._carry and not document.is_text:
            self._carried += 1
        elif not document.is_text:
            self._truncated += 1
            self._lost += int(np.count_nonzero(document.mask[self.ctx_len + 1 :]))

    def told(self, rows_together: int) -> AtLength:
        """What became of all of them. Where they are not packed, `rows_together` rows are computed together."""
        filled = np.frombuffer(self._pieces, np.int64)
        tokens = int(filled.sum())
        packed = len(pack(filled, self.ctx_len)[1]) - 1 if len(filled) else 0
        return AtLength(
            ctx_len=self.ctx_len,
            truncated=self._truncated,
            carried=self._carried,
            dropped=self._dropped,
            lost_tokens=self._lost,
            tokens=tokens,
            packed_rows=packed,
            packed_fill=tokens / (packed * self.ctx_len) if packed else 0.0,
            single_rows=len(filled),
            single_fill=fill_of_batches(filled, filled, rows_together) if len(filled) else 0.0,
        )


def histogram(lengths: Iterable[int]) -> list[tuple[int, int]]:
    """(the most tokens, how many have no more than that but more than those before), by powers of two, from the first
    that anything falls under to the last."""
    counts = np.bincount([(length - 1).bit_length() if length > 1 else 0 for length in lengths])
    first = int(np.argmax(counts > 0))
    return [(2**power, int(count)) for power, count in enumerate(counts) if power >= first]
