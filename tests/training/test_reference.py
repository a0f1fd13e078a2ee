"""The main job on a real model and real data: train, merge, run the merged file in the `rwkv` package."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rwkv_miss import load_adapter, load_model, merge
from rwkv_miss.config import AdapterConfig, TrainConfig
from tests.training.runs import losses, quiet_train

pytestmark = pytest.mark.slow


def test_shakespeare_merged_in_the_rwkv_package(reference, tiny_model, tmp_path, rwkv_logits):
    text = (reference / "data" / "tinyshakespeare.txt").read_text()
    data, merged = tmp_path / "text.txt", tmp_path / "merged.pth"
    data.write_text(text[:200_000])
    config = TrainConfig(
        base=str(tiny_model),
        data=str(data),
        tokenizer="bytes",
        out=str(tmp_path / "run"),
        adapter=AdapterConfig(r=16),
        val_split=0.05,
        ctx_len=256,
        batch_size=8,
        max_steps=40,
        lr=5e-3,
        warmup_steps=5,
    )
    result = quiet_train(config)
    assert result.best_val_loss < result.base_val_loss - 0.15

    adapter = Path(config.out) / "adapter"
    report = merge(tiny_model, adapter, merged)
    assert len(report.layers) == 72 and report.logits_effect > 0.1
    ids = list(text[-200:].encode())
    with torch.no_grad():
        ours = load_adapter(load_model(tiny_model), adapter)(torch.tensor([ids]))[0][0]
    torch.testing.assert_close(rwkv_logits(merged, ids), ours, rtol=0, atol=1e-4)


def test_gsm8k_with_loss_on_the_answers(reference, tiny_model, tmp_path):
    lines = (reference / "data" / "gsm8k-train.jsonl").read_text().splitlines(keepends=True)
    data = tmp_path / "gsm8k.jsonl"
    data.write_text("".join(lines[:100]))
    config = TrainConfig(
        base=str(tiny_model),
        data=str(data),
        tokenizer="bytes",
        out=str(tmp_path / "run"),
        adapter=AdapterConfig(r=16),
        ctx_len=1024,
        batch_size=2,
        max_steps=10,
        lr=5e-3,
        log_every=1,
    )
    quiet_train(config)
    found = losses(config.out)
    assert sum(found[-3:]) < sum(found[:3])
