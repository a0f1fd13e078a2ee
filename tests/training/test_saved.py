"""What a run saves: no frozen weights, and from shards whole weights that a runtime reads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rwkv_miss import load_adapter, load_model, merge
from rwkv_miss.adapters.files import WEIGHTS
from rwkv_miss.config import AdapterConfig, TrainConfig
from rwkv_miss.training.checks import last_checkpoint
from tests.training.runs import run_command, run_train, small_config

DEMO = Path(__file__).parents[2] / "scripts" / "demo"


@pytest.fixture
def demo(tmp_path) -> TrainConfig:
    """One step of the demo's model, which is larger than what is saved beside its weights."""
    config = small_config(DEMO / "base.pth", DEMO / "heldout.jsonl", tmp_path / "run")
    return replace(config, adapter=AdapterConfig(r=64), ctx_len=256, max_steps=1)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["auto", "ddp", "deepspeed_stage_2", "deepspeed_stage_3"])
def test_a_checkpoint_is_three_times_the_adapter(demo, strategy):
    """The weights and two moments, all in fp32; and nothing of the base."""
    config = demo if strategy == "auto" else replace(demo, strategy=strategy, devices=2, batch_size=4)
    done = run_train(config)
    assert done.returncode == 0, done.stderr
    path, _ = last_checkpoint(Path(config.out) / "checkpoints")
    size = sum(file.stat().st_size for file in [path, *path.rglob("*")] if file.is_file())
    adapter = (Path(config.out) / "adapter" / WEIGHTS).stat().st_size
    # ZeRO 1 and 2 keep the weights once more, as the optimizer's own flat copy.
    expected = 4 if strategy == "deepspeed_stage_2" else 3
    assert size / adapter == pytest.approx(expected, abs=0.25)


@pytest.mark.slow
@torch.no_grad()
def test_a_model_trained_in_full_in_shards_runs_in_the_rwkv_package(demo, tmp_path, rwkv_logits):
    config = replace(
        demo, adapter=AdapterConfig("full"), lr=1e-3, strategy="deepspeed_stage_3", devices=2, batch_size=4
    )
    done = run_command(config)
    assert done.returncode == 0, done.stderr
    merge(config.base, config.out, tmp_path / "merged.pth", dtype="fp32")
    tokens = torch.randint(256, (64,), generator=torch.Generator().manual_seed(0))
    trained = load_adapter(load_model(config.base, "fp32"), config.out)(tokens.unsqueeze(0))[0][0]
    theirs = rwkv_logits(tmp_path / "merged.pth", tokens.tolist())
    assert (
        (theirs - trained).abs().max() < 1e-3 < 1e-2 < (theirs - rwkv_logits(config.base, tokens.tolist())).abs().max()
    )
