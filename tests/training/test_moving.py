"""A run that goes on with other processes, another strategy, or other micro-batches."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from rwkv_miss.errors import UserError
from tests.training.runs import losses, quiet_train, run_train

ONE = {"strategy": "auto", "devices": 1, "batch_size": 8, "accumulate": 1}
TWO = {"strategy": "ddp", "devices": 2, "batch_size": 2, "accumulate": 2}
ZERO = {"strategy": "deepspeed_stage_3", "devices": 2, "batch_size": 4, "accumulate": 1}


@pytest.mark.slow
@pytest.mark.parametrize(
    "before, after, keeps_moments",
    [(ONE, TWO, True), (TWO, ONE, True), (ZERO, ONE, False), (ONE, ZERO, False)],
    ids=["1 to 2", "2 to 1", "ZeRO-3 to 1", "1 to ZeRO-3"],
)
def test_it_goes_on_in_the_same_place(make_config, tmp_path, before, after, keeps_moments):
    straight = make_config(out=str(tmp_path / "straight"), max_steps=7, chunk_len=16, bptt_chunks=2)
    straight = replace(straight, schedule="constant", warmup_steps=6)
    quiet_train(straight)
    # An epoch has 4 steps: step 3 is in the middle of the first, step 7 in the second.
    first = replace(straight, out=str(tmp_path / "parts"), max_steps=3, **before)
    stopped = run_train(first)
    assert stopped.returncode == 0, stopped.stderr
    done = run_train(replace(first, max_steps=7, resume="auto", **after))
    assert done.returncode == 0, done.stderr
    assert f"going on from step 3 with batch_size {after['batch_size']} (it was {before['batch_size']})" in done.stderr
    assert ("AdamW's moments cannot be restored" in done.stderr) != keeps_moments
    for column in ("tokens", "epoch", "lr"):
        assert losses(first.out, column) == losses(straight.out, column), column
    # Without the moments the weights go another way, from the first step after the one that they come to.
    found, expected = losses(first.out), losses(straight.out)
    assert found[:4] == pytest.approx(expected[:4], rel=2e-5)
    assert (found[4:] == pytest.approx(expected[4:], rel=2e-5)) == keeps_moments


@pytest.mark.slow
@pytest.mark.parametrize("after", [{"batch_size": 4, "accumulate": 2}, {"batch_size": 2, "accumulate": 4}])
def test_other_micro_batches_give_the_uninterrupted_run(make_config, tmp_path, after):
    straight = make_config(out=str(tmp_path / "straight"), max_steps=9, schedule="constant")
    quiet_train(straight)
    for stop in (3, 4):  # in the middle and at the end of an epoch
        first = replace(straight, out=str(tmp_path / f"parts-{stop}"), max_steps=stop)
        quiet_train(first)
        quiet_train(replace(first, max_steps=9, resume="auto", **after))
        assert losses(first.out) == pytest.approx(losses(straight.out), rel=1e-5)
        assert losses(first.out, "tokens") == losses(straight.out, "tokens")
        assert losses(first.out, "epoch") == losses(straight.out, "epoch")


def test_a_step_of_other_rows_is_refused(make_config):
    config = make_config(max_steps=1)
    quiet_train(config)
    with pytest.raises(UserError, match=r"batch_size 4 \(it was 8\): .* had 8 rows .* would have 4; change accumulate"):
        quiet_train(replace(config, max_steps=2, resume="auto", batch_size=4))


@pytest.mark.slow
def test_an_adapter_of_another_step_than_deepspeeds_checkpoint_is_refused(make_config):
    config = make_config(max_steps=1, **ZERO)
    assert run_train(config).returncode == 0
    facts = Path(config.out) / "adapter" / "rwkv_miss.json"
    facts.write_text(facts.read_text().replace('"step": 1', '"step": 2'))
    with pytest.raises(UserError, match=r"adapter: not of step 1, as .*step-00000001 is"):
        quiet_train(replace(config, max_steps=2, resume="auto", **ONE))
