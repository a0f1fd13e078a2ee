"""What a context length truncates and drops, of single records and of groups, and which length would be enough."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_miss.data import fitting
from rwkv_miss.data.documents import Document, gather
from rwkv_miss.data.fitting import tolerated
from rwkv_miss.data.packing import check_losses, make_rows
from rwkv_miss.errors import UserError
from tests.data.samples import conversation, cut_out, pairs, text_of


def split_long(documents, ctx_len, carry=False):
    """`fitting.split_long`, with the pieces as documents."""
    documents = gather(documents)
    pieces, too_long, dropped = fitting.split_long(documents, ctx_len, carry)
    return cut_out(documents, pieces), too_long, dropped


def cut_groups(documents, ctx_len, group_size):
    """`fitting.cut_groups`, with the pieces as documents and their numbers."""
    documents = gather(documents)
    pieces, truncated, dropped = fitting.cut_groups(documents, ctx_len, group_size)
    return cut_out(documents, pieces), pieces.records, truncated, dropped


def enough_ctx_len(documents, group_size=None):
    return fitting.enough_ctx_len(gather(documents), group_size)


@given(st.lists(st.integers(2, 60), min_size=1, max_size=8), st.integers(1, 20))
def test_split_long_keeps_every_target_of_a_text(lengths, ctx_len):
    ids = iter(range(1, 1000))
    documents = [text_of([next(ids) for _ in range(length)]) for length in lengths]
    fitted, truncated, dropped = split_long(documents, ctx_len)
    assert (truncated, dropped) == (0, 0)
    assert pairs(fitted) == pairs(documents)
    assert all(2 <= len(document.ids) <= ctx_len + 1 and not document.mask[0] for document in fitted)
    assert len(fitted) == sum(-(-(length - 1) // ctx_len) for length in lengths)


def test_split_long_truncates_and_drops_conversations():
    documents = [conversation(3, 2), conversation(3, 9), conversation(6, 1), conversation(4, 0), conversation(5, 2)]
    fitted, truncated, dropped = split_long(documents, ctx_len=5)
    assert (truncated, dropped) == (2, 2)
    assert [document.ids.tolist() for document in fitted] == [[1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6]]
    assert [int(document.mask.sum()) for document in fitted] == [2, 3, 1]


def test_split_long_carries_the_rest_of_conversations_on():
    two_answers = Document(np.arange(1, 15, dtype=np.int32), np.isin(np.arange(1, 15), [3, 14]))
    documents = [conversation(3, 2), conversation(3, 9), conversation(6, 1), conversation(9, 0), two_answers]
    fitted, carried, dropped = split_long(documents, ctx_len=5, carry=True)
    assert (carried, dropped) == (3, 1)
    assert pairs(fitted) == pairs(documents)
    assert [document.ids.tolist() for document in fitted] == [
        [1, 2, 3, 4, 5],
        [1, 2, 3, 4, 5, 6],
        [6, 7, 8, 9, 10, 11],
        [11, 12],
        [6, 7],  # the piece before it, 1 to 6, has no loss and is left out
        [1, 2, 3, 4, 5, 6],
        [11, 12, 13, 14],
    ]
    assert not any(document.mask[0] for document in fitted)


def test_split_long_that_drops_everything():
    documents = [conversation(9, 1), conversation(7, 3), conversation(4, 0)]
    with pytest.raises(UserError, match=r"ctx_len 5 .* of the 3 records; .* at least 7$"):
        split_long(documents, 5)
    assert split_long(documents, 7)[1:] == (1, 2)  # the length that the message promised is enough
    with pytest.raises(UserError, match="none of the 1 records has a token that carries loss"):
        split_long(documents[2:], 5)


@st.composite
def any_documents(draw, most=25):
    """Texts, conversations of one or two answers, and some with nothing to learn."""
    documents = []
    for _ in range(draw(st.integers(1, most))):
        kind = draw(st.sampled_from(["text", "answer", "answer", "answers", "nothing"]))
        prompt, answer = draw(st.integers(1, 12)), draw(st.integers(1, 12))
        if kind == "text":
            documents.append(text_of(range(prompt + 1)))
        elif kind == "answers":
            mask = np.arange(prompt + answer + 3) >= prompt + answer
            mask[prompt] = True
            documents.append(Document(np.arange(len(mask), dtype=np.int32), mask))
        else:
            documents.append(conversation(prompt, answer if kind == "answer" else 0))
    return documents


def lost(documents, ctx_len, group_size=None):
    """(documents cut or dropped, loss tokens lost), only of groups whose documents all have something to learn."""
    n = group_size or 1
    groups = [documents[i : i + n] for i in range(0, len(documents), n)]
    learnable = [d for group in groups if all(d.mask.any() for d in group) for d in group]
    if not learnable:
        return 0, 0
    try:
        if group_size is None:
            fitted, too_long, dropped = split_long(learnable, ctx_len)
        else:
            fitted, _, too_long, dropped = cut_groups(learnable, ctx_len, n)
    except UserError:
        return len(learnable), sum(int(d.mask.sum()) for d in learnable)
    kept = sum(int(d.mask.sum()) for d in fitted)
    return too_long + dropped, sum(int(d.mask.sum()) for d in learnable) - kept


@pytest.mark.parametrize("group_size", [None, 1, 2, 3])
@settings(max_examples=60)
@given(documents=any_documents(), repeated=st.sampled_from([1, 40]))
def test_the_enough_ctx_len_is_the_least_that_loses_no_more_than_one_percent(documents, repeated, group_size):
    documents = documents * repeated  # with 40 copies, 1 % is often more than nothing
    if group_size and len(documents) % group_size:
        documents = documents * group_size
    enough = enough_ctx_len(documents, group_size)
    n = group_size or 1
    groups = [documents[i : i + n] for i in range(0, len(documents), n)]
    total = sum(int(d.mask.sum()) for group in groups if all(d.mask.any() for d in group) for d in group)

    def is_enough(ctx_len):
        n_documents, n_tokens = lost(documents, ctx_len, group_size)
        return n_documents <= tolerated(len(documents)) and n_tokens <= tolerated(total)

    assert is_enough(enough)
    assert enough == 1 or not any(is_enough(c) for c in {1, enough // 2, enough - n, enough - 1} if c >= 1)


def test_the_report_counts_what_is_lost():
    documents = [conversation(3, 2)] * 96 + [conversation(3, 9)] * 3 + [conversation(8, 2)]
    _, report = make_rows(documents, 6, packing=True)
    assert (report.truncated, report.dropped) == (3, 1)
    assert (report.loss_tokens, report.lost_tokens) == (96 * 2 + 3 * 4, 3 * 5 + 2)
    assert report.enough_ctx_len == 11
    assert report.losses == (
        "of 100 records, 3 lose their ends to ctx_len 6 and 1 have nothing left to learn, with 17 of 221 loss tokens; "
        "ctx_len 11 would keep 99 % of the records whole and of the loss tokens"
    )
    for ctx_len, carry in ((11, False), (6, True)):
        _, report = make_rows(documents, ctx_len, packing=True, carry=carry)
        assert (report.lost_tokens, report.losses) == (0, None)


def test_one_long_record_among_few_tokens_is_told_too():
    documents = [conversation(3, 1)] * 199 + [conversation(3, 30)]
    _, report = make_rows(documents, 5, packing=True)
    assert report.truncated == 1 and report.lost_tokens == 27 and report.enough_ctx_len == 30
    assert make_rows(documents, 30, packing=True)[1].enough_ctx_len is None


def test_texts_lose_nothing():
    _, report = make_rows([text_of(range(1, 100))] * 3 + [text_of([1])], 5, packing=True)
    assert report.dropped == 1 and report.lost_tokens == 0 and report.losses is None


def test_losses_are_told_and_refused(caplog):
    def report(n_long):
        return make_rows([conversation(3, 2)] * (100 - n_long) + [conversation(3, 9)] * n_long, 6, packing=True)[1]

    check_losses(report(1), "a.jsonl", allow_dropping=False)  # 1 % of the records, but 2 % of the tokens
    assert len(caplog.messages) == 1 and caplog.messages[0].startswith("a.jsonl: of 100 records, 1 lose their ends")
    check_losses(report(50), "a.jsonl", allow_dropping=False)
    with pytest.raises(UserError, match=r"^a\.jsonl: of 100 records, 51 lose .* ctx_len 11 would .*--allow_dropping"):
        check_losses(report(51), "a.jsonl", allow_dropping=False)
    check_losses(report(51), "a.jsonl", allow_dropping=True)
    assert len(caplog.messages) == 3


# Groups


def test_groups_are_cut_to_equal_shares_and_dropped_whole():
    documents = [
        *(conversation(2, 2), conversation(2, 1)),  # whole
        *(conversation(2, 9), text_of(range(1, 20))),  # both truncated
        *(conversation(2, 2), conversation(5, 2)),  # the second has nothing left
        *(conversation(2, 2), conversation(2, 0)),  # the second has nothing at all
        *(conversation(4, 2), conversation(1, 1)),  # the first loses its last token
    ]
    fitted, numbers, truncated, dropped = cut_groups(documents, ctx_len=9, group_size=2)
    assert (truncated, dropped) == (3, 4)
    assert numbers.tolist() == [0, 1, 2, 3, 8, 9]
    assert [d.ids.tolist() for d in fitted] == [
        [1, 2, 3, 4],
        [1, 2, 3],
        [1, 2, 3, 4, 5],
        [1, 2, 3, 4, 5],
        [1, 2, 3, 4, 5],
        [1, 2],
    ]
    assert [int(d.mask.sum()) for d in fitted] == [2, 1, 3, 4, 1, 1]
    _, report = make_rows(documents, 9, packing=True, group_size=2)
    assert (report.records, report.truncated, report.carried, report.dropped) == (10, 3, 0, 4)


@pytest.mark.parametrize(
    ("documents", "ctx_len", "said"),
    [
        ([conversation(1, 1)] * 7, 8, r"7 records do not make groups of 2: 1 are left over"),
        ([conversation(1, 1)] * 2, 1, r"ctx_len 1 is too short for groups of 2"),
        (
            [conversation(3, 1), conversation(4, 1), conversation(6, 1), conversation(1, 1)],
            5,
            r"groups of 2 records it cuts off .* it must be at least 8$",
        ),
        ([conversation(1, 1), conversation(2, 0)], 8, r"in each of the 1 groups a record has no token that carries"),
    ],
)
def test_groups_that_cannot_be(documents, ctx_len, said):
    with pytest.raises(UserError, match=said):
        make_rows(documents, ctx_len, packing=True, group_size=2)


def test_the_ctx_len_that_the_message_promises_keeps_a_group():
    documents = [conversation(3, 1), conversation(4, 1), conversation(6, 1), conversation(1, 1)]
    assert cut_groups(documents, 8, 2)[1].tolist() == [0, 1]


def test_the_enough_ctx_len_counts_all_of_a_group_that_is_dropped():
    whole = [conversation(2, 10)] * 2
    # Two of 100 groups would be dropped for their second record: 4 of 200 records, 2 of them short.
    late = [[conversation(2, 1), conversation(n, 1)] for n in (20, 30)]
    assert enough_ctx_len(whole * 98 + late[0] + late[1], 2) == 2 * 20
    # One of 100, but with it the 100 loss tokens of its first record.
    assert enough_ctx_len(whole * 99 + [conversation(2, 100), conversation(150, 1)], 2) == 2 * 150


def test_groups_do_not_go_on():
    with pytest.raises(UserError, match="long_documents is carry"):
        make_rows([conversation(1, 1)] * 2, 8, packing=True, carry=True, group_size=2)
