"""What a preview says of context lengths is what a run makes of the documents."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rwkv_miss.data.documents import Document, gather
from rwkv_miss.data.fitting import split_long
from rwkv_miss.data.packing import make_rows
from rwkv_miss.errors import UserError
from rwkv_miss.previewing.lengths import Fitted, histogram, lengths_to_try, pieces

masks = st.lists(st.lists(st.booleans(), min_size=2, max_size=40), min_size=1, max_size=20)


def documents_of(masks):
    return [Document(np.arange(1, len(mask) + 1, dtype=np.int32), np.array([False, *mask[1:]])) for mask in masks]


@given(masks, st.integers(1, 50), st.booleans())
@example([[False, True, *[False] * 5, True]], 2, True)  # pieces without loss between the first and the last, short one
def test_it_says_what_becomes_of_the_documents(masks, ctx_len, carry):
    documents = documents_of(masks)
    fitted = Fitted(ctx_len, carry)
    for document in documents:
        fitted.take(document, len(document.ids) - 1, int(document.mask.sum()))
    told = fitted.told(4)
    try:
        rows, report = make_rows(documents, ctx_len, packing=True, carry=carry)
    except UserError:  # nothing would be left
        assert told.dropped == len(documents) and told.packed_rows == told.single_rows == told.tokens == 0
        return
    single, _ = make_rows(documents, ctx_len, packing=False, carry=carry)
    assert (told.truncated, told.carried, told.dropped) == (report.truncated, report.carried, report.dropped)
    assert (told.lost_tokens, told.tokens) == (report.lost_tokens, report.tokens)
    assert (told.packed_rows, told.single_rows) == (len(rows), len(single))
    assert told.packed_fill == pytest.approx(report.fill)
    expected = split_long(gather(documents), ctx_len, carry)[0].lengths.tolist()
    assert np.concatenate([pieces(document, ctx_len, carry) for document in documents]).tolist() == expected


def test_what_is_tried():
    assert lengths_to_try(512) == [2**n for n in range(7, 21)]
    assert lengths_to_try(100)[:3] == [100, 128, 256]


def test_the_histogram():
    assert histogram([3, 4, 5, 8, 9, 40]) == [(4, 2), (8, 2), (16, 1), (32, 0), (64, 1)]
    assert histogram([1, 1, 2]) == [(1, 2), (2, 1)]
    assert histogram([0]) == [(1, 1)]
