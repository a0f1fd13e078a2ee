"""Micro-batches: each row comes once over ranks, steps and windows, and a resumed run continues where it stopped."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace

import lightning
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint

from rwkv_miss.data.batches import BatchStream, count_windows
from rwkv_miss.data.binidx import write_binidx
from rwkv_miss.data.corpus import open_binidx
from rwkv_miss.data.documents import Document, all_documents
from rwkv_miss.data.packing import make_rows as make_any_rows
from rwkv_miss.errors import UserError
from tests.data.samples import steps_of

CTX_LEN = 6


def make_rows(count):
    """Row i is one document of 2 to CTX_LEN + 1 tokens, each i + 1. Its first target has no loss unless it is alone."""
    documents = []
    for i in range(count):
        length = 2 + i * 7 % CTX_LEN
        documents.append(Document(np.full(length, i + 1, np.int32), np.arange(length) >= min(2, length - 1)))
    return replace(make_any_rows(documents, CTX_LEN, packing=False)[0], width=CTX_LEN)


def make_stream(count=23, **options):
    settings = {"batch_size": 2, "accumulate": 1, "rank": 0, "world_size": 1, "seed": 0, "shuffle": True}
    return BatchStream(make_rows(count), **{**settings, "trim": True, **options})


def names(batch):
    """The indices of the rows in a micro-batch; a row of padding has none."""
    return [int(name) - 1 for name in batch["tokens"][:, 0] if name]


def loss_tokens(batch):
    return int((batch["targets"] != -100).sum())


sizes = {
    "count": st.integers(1, 40),
    "batch_size": st.integers(1, 5),
    "accumulate": st.integers(1, 4),
    "world_size": st.integers(1, 4),
}


@given(**sizes, shuffle=st.booleans(), trim=st.booleans())
def test_ranks_share_every_row_once(count, batch_size, accumulate, world_size, shuffle, trim):
    options = dict(batch_size=batch_size, accumulate=accumulate, shuffle=shuffle, trim=trim)
    ranks = [make_stream(count, rank=rank, world_size=world_size, **options) for rank in range(world_size)]
    epochs = [list(stream) for stream in ranks]
    steps = -(-count // (batch_size * accumulate * world_size))
    assert [len(stream) for stream in ranks] == [len(epoch) for epoch in epochs] == [steps * accumulate] * world_size

    assert sorted(name for epoch in epochs for batch in epoch for name in names(batch)) == list(range(count))
    for step in range(steps):
        window = slice(step * accumulate, (step + 1) * accumulate)
        micro_batches = [batch for epoch in epochs for batch in epoch[window]]
        total = sum(map(loss_tokens, micro_batches))
        assert {batch["step_tokens"] for batch in micro_batches} == {total}
        held = [len(names(batch)) for batch in micro_batches]
        assert max(held) - min(held) <= 1 and max(held) <= batch_size
        assert step == steps - 1 or min(held) == batch_size


@given(**sizes, epoch=st.integers(0, 2))
def test_order_is_of_seed_and_epoch_alone(count, batch_size, accumulate, world_size, epoch):
    """A step has the same rows however they are shared out over micro-batches and ranks."""

    def steps(batch_size, accumulate, world_size):
        options = dict(batch_size=batch_size, accumulate=accumulate, world_size=world_size)
        return steps_of(
            [make_stream(count, rank=rank, **options) for rank in range(world_size)], epoch, accumulate, names
        )

    assert steps(batch_size, accumulate, world_size) == steps(batch_size * accumulate * world_size, 1, 1)


def test_epochs_and_seeds_differ_and_no_shuffle_keeps_the_order():
    def order(stream):
        return [name for batch in stream for name in names(batch)]

    stream = make_stream()
    first, second = order(stream), order(stream)
    assert first != second and sorted(first) == sorted(second) == list(range(23))
    assert order(make_stream()) == first and order(make_stream(seed=1)) != first
    stream = make_stream(shuffle=False)
    assert order(stream) == order(stream) == list(range(23))


def test_a_micro_batch():
    batch = next(iter(make_stream(shuffle=False, batch_size=3, trim=False)))  # of 1, 2 and 3 positions
    assert [batch[name].dtype for name in ("tokens", "targets", "seq_start")] == [torch.int64, torch.int64, torch.bool]
    assert batch["tokens"].tolist() == [[1] + [0] * 5, [2] * 2 + [0] * 4, [3] * 3 + [0] * 3]
    assert batch["targets"].tolist() == [[1] + [-100] * 5, [-100, 2] + [-100] * 4, [-100, 3, 3] + [-100] * 3]
    assert batch["seq_start"].int().tolist() == [[1, 1, 0, 0, 0, 0], [1, 0, 1, 0, 0, 0], [1, 0, 0, 1, 0, 0]]
    assert batch["step_tokens"] == 4 and type(batch["step_tokens"]) is int
    trimmed = next(iter(make_stream(shuffle=False, batch_size=3)))
    assert batch["positions"] == 18 and trimmed["positions"] == 9
    for name in ("tokens", "targets", "seq_start"):
        assert torch.equal(trimmed[name], batch[name][:, :3])


@pytest.mark.parametrize(("trim", "width"), [(True, 1), (False, CTX_LEN)])
def test_a_micro_batch_without_rows_is_one_row_of_padding(trim, width):
    batches = list(make_stream(1, accumulate=2, shuffle=False, trim=trim))
    assert [names(batch) for batch in batches] == [[], [0]]
    padding = batches[0]
    assert padding["tokens"].tolist() == [[0] * width] and padding["targets"].tolist() == [[-100] * width]
    assert padding["seq_start"].int().tolist() == [[1] + [0] * (width - 1)]
    assert padding["step_tokens"] == 1


def same(batches, others):
    return len(batches) == len(others) and all(
        a["step_tokens"] == b["step_tokens"] and all(torch.equal(a[key], b[key]) for key in ("tokens", "targets"))
        for a, b in zip(batches, others, strict=True)
    )


@given(**sizes, trim=st.booleans(), window_len=st.integers(1, CTX_LEN + 1))
def test_windows_are_the_columns_of_the_rows_in_turn(count, batch_size, accumulate, world_size, trim, window_len):
    options = dict(batch_size=batch_size, accumulate=accumulate, world_size=world_size, trim=trim)
    ranks = [list(make_stream(count, rank=rank, window_len=window_len, **options)) for rank in range(world_size)]
    windows = count_windows(make_rows(count), window_len)
    assert windows == -(-CTX_LEN // window_len)
    for rank, batches in enumerate(ranks):
        whole = list(make_stream(count, rank=rank, **options))
        assert all(batch["last"] for batch in whole)
        assert len(batches) == len(whole) * windows == len(make_stream(count, window_len=window_len, **options))
        for i, row in enumerate(whole):
            parts = batches[i * windows : (i + 1) * windows]
            assert [part["last"] for part in parts] == [False] * (windows - 1) + [True]
            assert {part["step_tokens"] for part in parts} == {row["step_tokens"]}
            width = row["tokens"].shape[1]
            used = -(-width // window_len)
            for name in ("tokens", "targets", "seq_start"):
                found = torch.cat([part[name] for part in parts[:used]], 1)
                # Without rows a micro-batch is padding alone, whose seq_start is set where each window begins.
                assert torch.equal(found, row[name]) or not names(row)
            assert all(part["tokens"].shape == (len(row["tokens"]), 1) for part in parts[used:])
            assert sum(map(loss_tokens, parts)) == loss_tokens(row)
    for parts in zip(*ranks, strict=True):
        assert {part["has_loss"] for part in parts} == {sum(map(loss_tokens, parts)) > 0}
        assert len({part["tokens"].shape[1] for part in parts}) == 1
        assert len({part["positions"] for part in parts}) == 1
    for rank in ranks if not trim else []:  # trimmed widths depend on which rows are together
        assert sum(part["positions"] for part in rank) == count * CTX_LEN


@pytest.mark.parametrize("window_len", [None, 4])
def test_resumed_anywhere_goes_on_as_if_never_stopped(window_len):
    options = dict(accumulate=2, rank=1, world_size=2, window_len=window_len)
    whole = make_stream(**options)
    per_epoch = len(whole)
    wanted = [*whole, *whole, *whole, *whole]
    for stop in range(2 * per_epoch + 1):
        stream = make_stream(**options)
        list(itertools.islice(itertools.chain(*(stream for _ in range(3))), stop))
        state = copy.deepcopy(stream.state_dict())
        resumed = make_stream(**options)
        next(iter(resumed))
        resumed.load_state_dict(state)
        iter(resumed)  # an iterator that nothing is taken from changes nothing
        going_on = list(resumed)
        assert resumed.state_dict()["batch"] == per_epoch
        assert same(going_on, wanted[stop : stop + len(going_on)])
        assert len(going_on) == per_epoch - stop % per_epoch
        assert same(list(resumed), wanted[stop + len(going_on) :][:per_epoch])


def test_an_abandoned_iterator_is_not_gone_on_with():
    """After an abandoned pass, such as Lightning's sanity check of two validation batches, the next is complete."""
    stream = make_stream(shuffle=False)
    wanted = list(make_stream(shuffle=False))
    assert same(list(itertools.islice(stream, 2)), wanted[:2])
    assert same(list(stream), wanted)


@given(**sizes, packing=st.booleans(), window_len=st.sampled_from([None, 3]))
def test_filled_counts_what_is_no_padding(count, batch_size, accumulate, world_size, packing, window_len):
    """Each rank's `filled` is that of all ranks; over an epoch each position of each document is counted once."""
    documents = [Document(np.full(2 + i * 7 % 9, i + 1, np.int32), np.arange(2 + i * 7 % 9) > 0) for i in range(count)]
    rows, _ = make_any_rows(documents, 9, packing=packing)
    options = dict(batch_size=batch_size, accumulate=accumulate, world_size=world_size, seed=0, shuffle=True)
    ranks = [
        list(BatchStream(rows, rank=rank, trim=not packing, window_len=window_len, **options))
        for rank in range(world_size)
    ]
    for parts in zip(*ranks, strict=True):
        real = sum(int((part["tokens"] > 0).sum()) for part in parts)  # every token of these documents is above 0
        assert [(part["filled"], type(part["filled"])) for part in parts] == [(real, int)] * world_size
        assert all(part["filled"] <= part["positions"] for part in parts)
    assert sum(batch["filled"] for batch in ranks[0]) == sum(len(document.ids) - 1 for document in documents)


@pytest.mark.parametrize("packing", [True, False])
def test_filled_of_a_binidx(tmp_path, packing):
    texts = [[i % 50 + 1] * (2 + i * 7 % 30) for i in range(40)]
    write_binidx(tmp_path / "p", texts)
    in_memory = [Document(np.array(text, np.int32), np.arange(len(text)) > 0) for text in texts]
    found = []
    for documents in (all_documents(open_binidx(tmp_path / "p", 100)), in_memory):
        rows, _ = make_any_rows(documents, 16, packing=packing)
        options = dict(batch_size=2, accumulate=2, rank=0, world_size=2, seed=0, shuffle=True, trim=not packing)
        found.append([batch["filled"] for batch in BatchStream(rows, window_len=5, **options)])
    assert found[0] == found[1] and sum(found[0]) == sum(map(len, texts)) - 40


@given(
    **sizes,
    n=st.integers(1, 3),
    packing=st.booleans(),
    window_len=st.sampled_from([None, 4]),
)
def test_every_group_comes_once_and_whole(count, batch_size, accumulate, world_size, n, packing, window_len):
    documents = [
        Document(np.full(2 + i * 7 % 5, i + 1, np.int32), np.arange(2 + i * 7 % 5) > 0) for i in range(count * n)
    ]
    rows, _ = make_any_rows(documents, 12, packing=packing, group_size=n)
    options = dict(batch_size=batch_size, accumulate=accumulate, world_size=world_size, seed=0, shuffle=True)
    ranks = [
        list(BatchStream(rows, rank=rank, trim=not packing, window_len=window_len, **options))
        for rank in range(world_size)
    ]
    windows = count_windows(rows, window_len)
    seen = []
    for step in range(0, len(ranks[0]), accumulate * windows):
        in_step = set()
        for rank in ranks:
            for first in range(step, step + accumulate * windows, windows):
                parts = rank[first : first + windows]
                assert {part["records"].dtype for part in parts} == {torch.int64}
                assert all(torch.equal(part["records"] >= 0, part["tokens"] > 0) for part in parts)
                assert all((part["tokens"] == part["records"] + 1).all() for part in parts)  # document i: all i + 1
                here = {int(i) for part in parts for i in part["records"].unique() if i >= 0}
                assert here == {i // n * n + k for i in here for k in range(n)}  # whole groups
                seen += sorted(here)
                in_step |= {i // n for i in here}
        assert {batch["step_groups"] for rank in ranks for batch in rank[step : step + accumulate * windows]} == {
            len(in_step)
        }
    assert sorted(seen) == list(range(count * n))


def test_batches_without_groups_carry_no_records():
    batch = next(iter(make_stream()))
    assert not {"records", "step_groups"} & set(batch)


def test_a_state_of_another_run_is_refused():
    stream = make_stream()
    with pytest.raises(UserError, match=r"run of 6 micro-batches an epoch, this run has 12; resume with the same"):
        stream.load_state_dict(make_stream(batch_size=4).state_dict())


class Recorder(lightning.LightningModule):
    """Notes which rows each training step got."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen, self.validated = [], []

    def training_step(self, batch, _):
        self.seen.append(names(batch))
        return self.weight * 1.0

    def validation_step(self, batch, _):
        self.validated.append(names(batch))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(folder, *, max_steps, resume=None, seen_before=()):
    module = Recorder()
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=max_steps,
        accumulate_grad_batches=2,
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1, filename="{step}")],
    )
    validation = make_stream(5, shuffle=False)
    trainer.fit(module, make_stream(accumulate=2), validation, ckpt_path=resume)
    return module


def test_lightning_resumes_at_every_step(tmp_path):
    stream = make_stream(accumulate=2)
    wanted = [names(batch) for batch in [*stream, *stream, *stream]]
    whole = fit(tmp_path / "whole", max_steps=15)
    assert whole.seen == wanted[:30]
    assert whole.validated == [[0, 1], [2, 3]] + [[0, 1], [2, 3], [4]] * 2  # first two for Lightning's sanity check
    for step in (1, 5, 6, 7, 12):
        resumed = fit(tmp_path / "resumed", max_steps=15, resume=tmp_path / "whole" / f"step={step}.ckpt")
        assert resumed.seen == wanted[2 * step : 30], step
