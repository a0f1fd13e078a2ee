"""Runs in chunks: with exact gradients they equal the run of whole rows; with truncated gradients they do not depend on
how the rows are shared out."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rwkv_miss.config import TrainConfig
from rwkv_miss.data.batches import BatchStream
from rwkv_miss.errors import RunError, UserError
from rwkv_miss.training.checks import last_checkpoint
from tests.training.runs import adapter, losses, quiet_train, run_train


@pytest.fixture
def long_config(make_config, tmp_path) -> Callable[..., TrainConfig]:
    """4 steps of 4 documents of 28 to 223 tokens, of which some have all their loss in the last few."""
    data = tmp_path / "long.jsonl"
    records = [
        {"question": "count " + "and again " * (n % 5 * 3), "answer": " ".join(["tick"] * (n * 7 % 25 + 1))}
        for n in range(14)
    ]
    data.write_text("".join(json.dumps(r) + "\n" for r in records))
    settings = dict(data=str(data), ctx_len=240, batch_size=4, max_steps=4)
    return lambda **changes: make_config(**settings | changes)


def in_processes(config: TrainConfig) -> None:
    done = run_train(config)
    assert done.returncode == 0, done.stderr


def assert_same(out: str | Path, other: str | Path) -> None:
    assert losses(out) == pytest.approx(losses(other), rel=2e-5)
    for name, block in adapter(out).items():
        torch.testing.assert_close(block, adapter(other)[name], rtol=2e-3, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("packing", [False, True])
def test_exact_chunks_give_the_run_of_whole_rows(long_config, tmp_path, packing):
    whole = long_config(packing=packing, val_split=0.2, val_every=2)
    exact = replace(whole, out=str(tmp_path / "exact"), chunk_len=30)
    for config in (whole, exact):
        quiet_train(config)
    assert len(losses(whole.out, "val_loss")) == 3
    assert losses(exact.out, "val_loss") == pytest.approx(losses(whole.out, "val_loss"), rel=2e-5)
    assert_same(exact.out, whole.out)
    # A window as long as a row truncates nothing.
    uncut = replace(exact, out=str(tmp_path / "uncut"), bptt_chunks=8)
    quiet_train(uncut)
    assert losses(uncut.out) == losses(exact.out)


def test_cut_gradients_have_the_loss_of_whole_rows_and_other_gradients(long_config, tmp_path):
    whole = long_config(packing=True)
    cut = replace(whole, out=str(tmp_path / "cut"), chunk_len=16, bptt_chunks=1)
    for config in (whole, cut):
        quiet_train(config)
    assert losses(cut.out)[0] == pytest.approx(losses(whole.out)[0], rel=1e-6)
    with pytest.raises(AssertionError):
        assert_same(cut.out, whole.out)
    assert losses(cut.out)[-1] < losses(cut.out)[0] - 0.3


@pytest.fixture
def cut_config(long_config, tmp_path) -> TrainConfig:
    """Windows of 32 tokens: 8 a row, of which some are beyond the documents' ends and some have no loss."""
    return long_config(chunk_len=16, bptt_chunks=2, out=str(tmp_path / "one"))


@pytest.fixture
def cut_run(cut_config) -> TrainConfig:
    """What has been trained with `cut_config`."""
    quiet_train(cut_config)
    return cut_config


@pytest.mark.slow
def test_windows_without_loss_only_move_the_state(cut_run, monkeypatch, tmp_path):
    """They are run without gradients, for speed: the results are those of a run with gradients."""
    marks = []

    def with_gradients(self, order, number, micro_batch=BatchStream._micro_batch):
        batch = micro_batch(self, order, number)
        marks.append((batch["has_loss"], batch["tokens"].shape[1]))
        return batch | {"has_loss": True}

    monkeypatch.setattr(BatchStream, "_micro_batch", with_gradients)
    config = replace(cut_run, out=str(tmp_path / "with"))
    quiet_train(config)
    assert {(True, 32), (False, 32), (False, 1)} <= set(marks)
    assert_same(config.out, cut_run.out)


@pytest.mark.slow
@pytest.mark.parametrize("batch_size, accumulate", [(2, 2), (1, 4)])
def test_accumulation_gives_the_run_of_one_micro_batch(cut_run, tmp_path, batch_size, accumulate):
    config = replace(cut_run, out=str(tmp_path / "shared"), batch_size=batch_size, accumulate=accumulate)
    quiet_train(config)
    assert_same(config.out, cut_run.out)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "deepspeed_stage_2", "deepspeed_stage_3"])
def test_strategies_give_the_run_of_one_process(cut_run, tmp_path, strategy):
    config = replace(cut_run, out=str(tmp_path / "two"), strategy=strategy, devices=2, batch_size=1, accumulate=2)
    in_processes(config)
    assert_same(config.out, cut_run.out)


@pytest.mark.slow
def test_exact_chunks_under_zero_3(long_config, tmp_path):
    """Every chunk, and every block in it, is recomputed while ZeRO-3 gathers and releases the weights."""
    whole = long_config()
    quiet_train(whole)
    exact = replace(whole, out=str(tmp_path / "two"), chunk_len=30, gradient_checkpointing=True)
    exact = replace(exact, strategy="deepspeed_stage_3", devices=2, batch_size=2)
    in_processes(exact)
    assert_same(exact.out, whole.out)


@pytest.mark.slow
@pytest.mark.parametrize("stop", [2, 4])
def test_resume_gives_the_uninterrupted_run(cut_run, tmp_path, stop):
    """An epoch has 4 steps: one stop is in its middle, one at its end."""
    straight = replace(cut_run, out=str(tmp_path / "straight"), max_steps=6, schedule="constant")
    first = replace(straight, out=str(tmp_path / "parts"), max_steps=stop)
    for config in (straight, first, replace(first, max_steps=6, resume="auto")):
        quiet_train(config)
    assert losses(first.out) == losses(straight.out)
    assert all(torch.equal(b, adapter(straight.out)[n]) for n, b in adapter(first.out).items())
    assert last_checkpoint(Path(first.out) / "checkpoints")[1] == 6


def test_resume_with_other_chunks_is_refused(cut_run):
    for changed in ({"chunk_len": 32, "bptt_chunks": 1}, {"bptt_chunks": 0}):
        said = "; ".join(f"{name} was {getattr(cut_run, name)}, is {value}" for name, value in changed.items())
        with pytest.raises(UserError, match=re.escape(f"cannot resume with other settings: {said}")):
            quiet_train(replace(cut_run, resume="auto", **changed))


def test_a_run_from_before_chunks_resumes(long_config, tmp_path):
    config = long_config(out=str(tmp_path / "before"), max_steps=1)
    quiet_train(config)
    settings = Path(config.out) / "config.yaml"
    kept = [x for x in settings.read_text().splitlines() if not re.match("chunk_len|bptt_chunks|long_documents", x)]
    settings.write_text("\n".join(kept))
    assert quiet_train(replace(config, resume="auto", max_steps=2)).steps == 2


def test_a_state_that_is_not_finite_is_found_in_the_window_that_reads_it(cut_config, monkeypatch, tmp_path):
    from rwkv_miss.training import lit_module

    log_probs = lit_module.batch_log_probs

    def spoilt(*arguments):
        loss, state = log_probs(*arguments)
        state.wkv[1] = float("inf")
        return loss, state

    monkeypatch.setattr(lit_module, "batch_log_probs", spoilt)
    with pytest.raises(RunError, match=r"step 1: the loss is nan.* is blocks\.1\.att"):
        quiet_train(replace(cut_config, out=str(tmp_path / "spoilt")))


def test_long_documents_carried_on(long_config, tmp_path):
    from rich.console import Console

    from rwkv_miss.training.start import train

    config = long_config(ctx_len=64, max_steps=1, long_documents="carry")
    with (tmp_path / "said.txt").open("w") as file:
        train(config, Console(file=file))
    assert "0 truncated, 13 carried on, 0 dropped" in (tmp_path / "said.txt").read_text()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"chunk_len": 0}, "chunk_len is 0; it must be at least 1, or be left out to run rows whole"),
        ({"chunk_len": -1, "bptt_chunks": 1}, "chunk_len is -1; it must be at least 1"),
        ({"chunk_len": 8, "bptt_chunks": -2}, "bptt_chunks is -2; it cannot be negative"),
        ({"bptt_chunks": 2}, "bptt_chunks is given without chunk_len; give both, or neither"),
        ({"chunk_len": 240}, "chunk_len is 240 and ctx_len 240, so there is nothing to cut; raise ctx_len"),
        ({"chunk_len": 230}, "no document is longer than chunk_len 230 (the longest has 223 tokens); lower chunk_len"),
        ({"chunk_len": 223}, "no document is longer than chunk_len 223 (the longest has 223 tokens)"),
    ],
)
def test_chunks_that_cannot_be(long_config, changes, said):
    config = long_config(**changes)
    with pytest.raises(UserError, match=re.escape(said)):
        quiet_train(config)
    assert not Path(config.out).exists()
