"""What one optimizer step computes must not depend on how its rows are shared out."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from rwkv_miss.adapters.inject import inject, trained_parameters
from rwkv_miss.data.batches import BatchStream
from rwkv_miss.data.packing import make_rows
from rwkv_miss.model.load import load_model
from rwkv_miss.training.figures import read_samples
from tests.data.samples import read_documents
from tests.helpers import loss_sum
from tests.training.runs import adapter, losses, quiet_train, run_train, small_config


@pytest.fixture(scope="module")
def whole(base, data, tmp_path_factory):
    """The run with each step's 8 rows in one micro-batch of one process."""
    config = small_config(base, data, tmp_path_factory.mktemp("whole"))
    quiet_train(config)
    return losses(config.out), adapter(config.out), losses(config.out, "grad_norm")


def assert_same_run(out, whole):
    assert losses(out) == pytest.approx(whole[0], rel=2e-5)
    assert losses(out, "grad_norm") == pytest.approx(whole[2], rel=1e-4)
    for name, block in adapter(out).items():
        torch.testing.assert_close(block, whole[1][name], rtol=2e-3, atol=2e-5)


def test_the_first_loss_is_the_mean_over_the_steps_tokens(make_config, whole):
    config = make_config()
    model = load_model(config.base)
    documents = read_documents(config.data, config)
    rows, _ = make_rows(documents, config.ctx_len, packing=False)
    settings = dict(batch_size=8, accumulate=1, rank=0, world_size=1, seed=config.seed, shuffle=True, trim=False)
    batch = next(iter(BatchStream(rows, **settings)))
    with torch.no_grad():
        mean = loss_sum(model, batch)[0] / (batch["targets"] >= 0).sum()
    assert whole[0][0] == pytest.approx(mean.item(), rel=1e-5)


def test_the_gradient_norm_is_that_of_the_mean_loss_before_clipping(make_config, whole):
    """Against PyTorch's own gradients in float64; the largest norm let through is 2.5."""
    config = make_config()
    model = inject(load_model(config.base), config.adapter).double()
    documents = read_documents(config.data, config)
    rows, _ = make_rows(documents, config.ctx_len, packing=False)
    settings = dict(batch_size=8, accumulate=1, rank=0, world_size=1, seed=config.seed, shuffle=True, trim=False)
    batch = next(iter(BatchStream(rows, **settings)))
    loss = F.cross_entropy(model(batch["tokens"])[0].flatten(0, 1), batch["targets"].flatten())
    loss.backward()
    squares = [float(p.grad.square().sum()) for p in trained_parameters(model).values()]
    assert math.sqrt(sum(squares)) > 2.5
    assert whole[2][0] == pytest.approx(math.sqrt(sum(squares)), rel=1e-5)


@pytest.mark.parametrize("batch_size, accumulate", [(4, 2), (1, 8)])
def test_accumulation_gives_the_run_of_one_micro_batch(make_config, whole, batch_size, accumulate):
    config = make_config(batch_size=batch_size, accumulate=accumulate)
    quiet_train(config)
    assert_same_run(config.out, whole)


def test_gradient_checkpointing_gives_the_same_run(make_config, whole, recomputed_blocks):
    config = make_config(gradient_checkpointing=True)
    quiet_train(config)
    assert recomputed_blocks
    assert_same_run(config.out, whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    "strategy, devices", [("ddp", 2), ("deepspeed_stage_1", 1), ("deepspeed_stage_2", 1), ("deepspeed_stage_3", 2)]
)
def test_strategies_give_the_run_of_one_process(make_config, whole, strategy, devices):
    """With clipping in force, and with samples, in which every process takes part. More in test_strategies.py."""
    config = make_config(strategy=strategy, devices=devices, batch_size=4 // devices, accumulate=2)
    config = replace(config, sample_every=4, sample_tokens=3)
    done = run_train(config)
    assert done.returncode == 0, done.stderr
    assert_same_run(config.out, whole)
    assert [sample["step"] for sample in read_samples(Path(config.out) / "samples.jsonl")] == [0] * 3 + [4] * 3 + [
        6
    ] * 3


def test_a_bf16_base_keeps_its_dtype_and_the_adapter_is_fp32(make_config, whole):
    config = make_config(precision="bf16")
    quiet_train(config)
    assert losses(config.out) == pytest.approx(whole[0], rel=0.02)
    assert {block.dtype for block in adapter(config.out).values()} == {torch.float32}
    # fp32 updates: a bf16 parameter would hold multiples of 2^-8 of its size only.
    assert any(not torch.equal(b, b.bfloat16().float()) for b in adapter(config.out).values())


@pytest.mark.slow
def test_deepspeed_trains_beside_a_bf16_base(make_config):
    one = make_config(precision="bf16")
    quiet_train(one)
    config = replace(one, out=one.out + "-ds", strategy="deepspeed_stage_3", devices=2, batch_size=4)
    done = run_train(config)
    assert done.returncode == 0, done.stderr
    # The first loss is that of the same bf16 forward: weights cast to fp32 would give another.
    assert losses(config.out)[0] == pytest.approx(losses(one.out)[0], rel=1e-6)
    assert losses(config.out) == pytest.approx(losses(one.out), rel=0.02)
    assert {block.dtype for block in adapter(config.out).values()} == {torch.float32}
