"""Stores: where the loss is, and the rows of a binidx, which are those of the same documents in memory and take no
memory for tokens."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rwkv_miss.config import DataOptions
from rwkv_miss.data.batches import BatchStream
from rwkv_miss.data.binidx import write_binidx
from rwkv_miss.data.corpus import open_binidx
from rwkv_miss.data.documents import Document, all_documents, gather, split_validation
from rwkv_miss.data.packing import make_rows
from rwkv_miss.data.parts import PartSettings, read_parts
from rwkv_miss.data.sources import Source
from rwkv_miss.errors import UserError
from tests.data.samples import everything
from tests.processes import run_process


def in_memory(texts):
    return gather([Document(np.array(ids, np.int32), np.arange(len(ids)) > 0) for ids in texts])


def open_documents(prefix, vocab_size):
    return all_documents(open_binidx(prefix, vocab_size))


@pytest.fixture
def opened(tmp_path):
    """`opened(texts, vocab_size=100)` writes the lists of ids as a binidx and opens it."""

    def make(texts, vocab_size=100):
        write_binidx(tmp_path / "p", texts)
        return open_documents(tmp_path / "p", vocab_size)

    return make


def same_rows(rows, others):
    laid, other = everything(rows), everything(others)
    return len(rows) == len(others) and all(
        np.array_equal(getattr(laid, name), getattr(other, name)) for name in ("tokens", "targets", "seq_start")
    )


texts = st.lists(st.lists(st.integers(1, 99), max_size=30), min_size=1, max_size=25)


@given(texts.filter(lambda texts: max(map(len, texts)) > 1), st.integers(1, 12), st.booleans())
def test_rows_are_those_of_documents_in_memory(tmp_path_factory, texts, ctx_len, packing):
    prefix = tmp_path_factory.mktemp("pair") / "p"
    write_binidx(prefix, texts)
    rows, report = make_rows(open_documents(prefix, 100), ctx_len, packing=packing)
    wanted, wanted_report = make_rows(in_memory(texts), ctx_len, packing=packing)
    assert same_rows(rows, wanted) and report == wanted_report
    assert rows.loss_tokens.tolist() == wanted.loss_tokens.tolist()
    assert rows.filled.tolist() == wanted.filled.tolist()


@pytest.mark.parametrize(("n", "fraction"), [(40, 0.25), (1, 0.3), (7, 0)])
def test_the_same_are_held_out(opened, n, fraction):
    texts = [list(range(1, 20 + i)) for i in range(n)]
    for found, wanted in zip(
        split_validation([opened(texts)], fraction, 3), split_validation([in_memory(texts)], fraction, 3), strict=True
    ):
        [found], [wanted] = found, wanted
        assert len(found) == len(wanted)
        for a, b in zip(found, wanted, strict=True):
            assert a.ids.tolist() == b.ids.tolist() and a.mask.tolist() == b.mask.tolist()
    assert fraction == 0 or len(found) == round(n * fraction) or n == 1


@pytest.mark.parametrize(("texts", "fraction"), [([[1, 2, 3]] * 4, 0.99), ([[1, 2, 3]] * 4, 0.01), ([[1, 2]], 0.5)])
def test_nothing_left_on_one_side(opened, texts, fraction):
    with pytest.raises(UserError, match="leaves nothing to"):
        split_validation([opened(texts)], fraction, 0)


def test_an_end_inside_a_document_begins_a_new_one(opened):
    rows, _ = make_rows(opened([[1, 2, 0, 3, 4, 0], [5, 6, 0]]), 9, packing=True)
    [taken] = [rows.take(np.array([0]))]
    assert taken.tokens.tolist() == [[1, 2, 0, 3, 4, 5, 6, 0, 0]]
    assert taken.targets.tolist() == [[2, 0, 3, 4, 0, 6, 0, -100, -100]]
    assert taken.seq_start.astype(int).tolist() == [[1, 0, 1, 0, 0, 1, 0, 1, 0]]


def test_groups_are_refused(opened, tmp_path):
    opened([[1, 2], [3, 4]])
    source = Source("p", (tmp_path / "p.idx",), 1, DataOptions())
    with pytest.raises(UserError, match=r"p: a binidx does not say which documents belong to a group; give records"):
        read_parts([source], PartSettings("bytes", 256, 8, True, carry=False, group_size=2, val_split=0.5, seed=0))


def test_too_short_to_learn_anything(opened):
    with pytest.raises(UserError, match=r"p\.bin: none of the 3 records has a token that carries loss"):
        make_rows(opened([[1], [], [2]]), 8, packing=True)


def test_part_of_the_documents(opened):
    documents = opened([[1, 2], [3, 4], [5, 6]])
    assert [d.ids.tolist() for d in documents[:2]] == [[1, 2], [3, 4]] and len(documents[1:]) == 2


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
@pytest.mark.parametrize("at", [0, 7, 2999])
def test_an_id_beyond_the_vocabulary_is_found_at_load(tmp_path, at, dtype):
    texts = [[1, 2, 3]] * 1000
    texts[at // 3] = [1 + 199 * (3 * (at // 3) + i == at) for i in range(3)]
    write_binidx(tmp_path / "p", texts, dtype)
    message = rf"p\.bin: document {at // 3} \(of 0 to 999\): token 200 is not in the model's vocabulary of 200 ids"
    with pytest.raises(UserError, match=message):
        open_documents(tmp_path / "p", 200)
    assert len(open_documents(tmp_path / "p", 201)) == 1000


def test_a_negative_id_is_refused(tmp_path):
    write_binidx(tmp_path / "p", [[1, 2], [3, -4]], np.int32)
    with pytest.raises(UserError, match=r"document 1 .*token -4 is not in the model's vocabulary"):
        open_documents(tmp_path / "p", 200)


def test_what_the_sample_missed_is_found_when_it_is_used(tmp_path):
    """There is one bad token among 600,000, of which the sample sees some 2 %."""
    tokens = np.ones((20_000, 30), np.uint16)
    tokens[12_345, 29] = 200
    write_binidx(tmp_path / "p", tokens)
    rows, _ = make_rows(open_documents(tmp_path / "p", 200), 29, packing=True)
    settings = dict(accumulate=1, rank=0, world_size=1, seed=0, shuffle=False, trim=False)
    seen = 0
    with pytest.raises(UserError, match=r"document 12345 .*token 200 is not in the model's vocabulary of 200"):
        for _ in BatchStream(rows, batch_size=100, **settings):
            seen += 1
    assert seen == 123


@pytest.mark.slow
def test_memory_is_for_places_not_for_tokens(tmp_path):
    """20 million tokens (40 MB; 9 bytes a token, 180 MB, as rows in memory) in documents of 5,000: the process may
    not grow by a fifth of the file before its first batch."""
    write_binidx(tmp_path / "p", (np.full(5000, i % 99 + 1, np.uint16) for i in range(4000)))
    code = f"""
from rwkv_miss.config import DataOptions
from rwkv_miss.data.batches import BatchStream
from rwkv_miss.data.corpus import open_binidx
from rwkv_miss.data.documents import all_documents
from rwkv_miss.data.packing import make_rows
def anonymous():
    line = next(line for line in open("/proc/self/status") if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024
before = anonymous()
rows, _ = make_rows(all_documents(open_binidx({str(tmp_path / "p")!r}, 100)), 512, packing=True)
stream = BatchStream(
    rows, batch_size=8, accumulate=1, rank=0, world_size=1, seed=0, shuffle=True, trim=False
)
next(iter(stream))
print(len(rows), anonymous() - before)
"""
    done = run_process([sys.executable, "-c", code], timeout=120)
    assert done.returncode == 0, done.stderr
    rows, grown = map(int, done.stdout.split())
    assert rows >= 4000 * 4999 / 512
    assert grown < 8e6
