"""Several sources in one run: their weights are exact, ranks share the rows, and a resumed run goes on."""

from __future__ import annotations

import copy
import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rwkv_miss.data.batches import BatchStream
from rwkv_miss.data.documents import Document
from rwkv_miss.data.packing import make_rows
from rwkv_miss.data.rows import epoch_rows, mix
from tests.data.samples import everything, steps_of, text_of


def one_row_each(first, count):
    """Rows of one document each, whose tokens are all first, all first + 1, ..."""
    return make_rows([text_of([first + i] * (2 + i % 3)) for i in range(count)], 8, packing=False)[0]


counts = st.lists(st.integers(1, 12), min_size=1, max_size=4)
weights = st.sampled_from([0.1, 0.25, 0.5, 1, 1.5, 2, 3])


@st.composite
def mixtures(draw):
    """(rows, the weight of each source); the first token of a row is its number, from 1."""
    sources, given, first = [], [], 1
    for count in draw(counts):
        sources.append(one_row_each(first, count))
        given.append(draw(weights))
        first += count
    return mix(sources, given), given


@given(mixtures(), st.integers(0, 5), st.integers(1, 9))
def test_weights_are_exact(mixture, seed, epochs):
    """In every epoch a source has its share of rows, to half a row; over epochs its rows come equally often."""
    rows, given = mixture
    seen = Counter()
    for epoch in range(epochs):
        came = epoch_rows(rows, seed, epoch)
        assert len(came) == rows.epoch_size and (np.diff(came) >= 0).all()
        seen.update(came.tolist())
        for first, stop, weight in zip(rows.firsts[:-1], rows.firsts[1:], given, strict=True):
            n = np.count_nonzero((first <= came) & (came < stop))
            assert abs(n - weight * (stop - first)) <= 0.5 or n == 1
            times = [seen[row] for row in range(first, stop)]
            assert max(times) - min(times) <= 1
            if weight == int(weight):
                assert times == [weight * (epoch + 1)] * (stop - first)


def test_half_is_every_second_epoch_and_one_and_a_half_once_or_twice_in_turn():
    for weight, in_turn in ((0.5, {(0, 1), (1, 0)}), (1.5, {(1, 2), (2, 1)})):
        rows = mix([one_row_each(1, 10)], [weight])
        epochs = [Counter(epoch_rows(rows, 7, epoch).tolist()) for epoch in range(6)]
        for row in range(10):
            times = [epoch[row] for epoch in epochs]
            assert tuple(times[:2]) in in_turn and times == times[:2] * 3
        assert Counter(epoch_rows(rows, 8, 0).tolist()) != epochs[0]  # another seed draws others


def names(batch):
    return [int(name) for name in batch["tokens"][:, 0] if name]


def stream(rows, **options):
    settings = {"batch_size": 2, "accumulate": 1, "rank": 0, "world_size": 1, "seed": 0, "shuffle": True}
    return BatchStream(rows, trim=True, **{**settings, **options})


def test_the_order_of_one_source_is_that_of_its_rows_shuffled():
    order = np.arange(1, 24)
    rows = mix([one_row_each(1, 23)], [1])
    batches = stream(rows, seed=5)
    for epoch in range(3):
        shuffled = order.copy()
        np.random.Generator(np.random.PCG64([5, epoch])).shuffle(shuffled)
        assert [name for batch in batches for name in names(batch)] == shuffled.tolist()


@given(mixtures(), st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(0, 2))
def test_ranks_share_what_comes_in_an_epoch(mixture, batch_size, accumulate, world_size, epoch):
    """A step has the same rows however they are shared out, and all together are those of the epoch."""
    rows, _ = mixture

    def steps(batch_size, accumulate, world_size):
        options = dict(batch_size=batch_size, accumulate=accumulate, world_size=world_size)
        return steps_of([stream(rows, rank=rank, **options) for rank in range(world_size)], epoch, accumulate, names)

    found = steps(batch_size, accumulate, world_size)
    assert found == steps(batch_size * accumulate * world_size, 1, 1)
    assert sorted(itertools.chain(*found)) == (epoch_rows(rows, 0, epoch) + 1).tolist()


@given(mixtures(), st.data())
def test_resumed_anywhere_it_goes_on(mixture, data):
    options = dict(accumulate=2, rank=1, world_size=2)
    whole = stream(mixture[0], **options)
    wanted = [names(batch) for _ in range(5) for batch in whole]
    stop = data.draw(st.integers(0, 3 * len(whole)))
    first = stream(mixture[0], **options)
    list(itertools.islice(itertools.chain(*(first for _ in range(4))), stop))
    resumed = stream(mixture[0], **options)
    resumed.load_state_dict(copy.deepcopy(first.state_dict()))
    going_on = [names(batch) for _ in range(2) for batch in resumed]
    assert going_on == wanted[stop : stop + len(going_on)]


@pytest.mark.parametrize("group_size", [None, 2])
def test_mixed_rows_are_those_of_the_sources(group_size):
    texts = [[text_of(range(1, 2 + n)) for n in range(1, 9)], [text_of([9] * 5), text_of([8] * 3)]]
    texts[1][0] = Document(texts[1][0].ids, np.arange(5) > 2)
    made = [
        make_rows(documents, ctx_len, True, group_size=group_size)[0]
        for documents, ctx_len in zip(texts, (20, 16), strict=True)
    ]
    rows = mix(made, [1, 2])
    assert (len(rows), rows.width, rows.epoch_size) == (sum(map(len, made)), 20, len(made[0]) + 2 * len(made[1]))
    laid, first = everything(rows), 0
    for part, records in zip(made, (0, 8), strict=True):
        of_part = everything(part)
        mine = slice(first, first + len(part))
        assert (
            np.array_equal(laid.tokens[mine, : part.width], of_part.tokens)
            and not laid.tokens[mine, part.width :].any()
        )
        assert np.array_equal(laid.targets[mine, : part.width], of_part.targets)
        assert (laid.targets[mine, part.width :] == -100).all()
        assert np.array_equal(laid.seq_start[mine, : part.width], of_part.seq_start)
        for name in ("loss_tokens", "filled", "used"):
            assert np.array_equal(getattr(rows, name)[mine], getattr(part, name))
        for row in range(len(part)):
            for columns in (slice(0, 2), slice(2, 9), slice(9, 16)):
                wanted = (of_part.targets[row, columns] >= 0).any()
                assert (
                    rows.has_loss(np.array([first + row]), columns) == wanted == part.has_loss(np.array([row]), columns)
                )
        if group_size:
            padded = of_part.records == -1
            assert np.array_equal(laid.records[mine, : part.width], np.where(padded, -1, of_part.records + records))
            assert np.array_equal(rows.groups[mine], part.groups)
        first += len(part)
    assert rows.fingerprint() != mix(made, [1, 1]).fingerprint() != mix(made[::-1], [1, 1]).fingerprint()
