"""Runs of LoRA, DoRA and PiSSA: alone and beside a state, resumed, merged, on several ranks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rwkv_miss import load_adapter, load_model, merge
from rwkv_miss.adapters.dora import Dora
from rwkv_miss.adapters.low_rank import LowRank
from rwkv_miss.adapters.method import find_methods
from rwkv_miss.adapters.pissa import Pissa
from rwkv_miss.config import AdapterConfig
from tests.training.runs import adapter, losses, quiet_train, run_train, small_config

METHODS = {
    "lora": AdapterConfig("lora", r=4, dropout=0.1, options={"alpha": 8.0, "lr_ratio": 4.0}),
    "dora": AdapterConfig("dora", r=4, options={"alpha": 4.0, "rank_stabilized": True}),
    "pissa": AdapterConfig("pissa", r=4, options={"alpha": 4.0}),
}
TOKENS = torch.randint(256, (2, 13), generator=torch.Generator().manual_seed(0))


def without_start() -> None:
    """All that a resumed run needs comes from the checkpoint."""
    for kind in (Dora, LowRank, Pissa):
        kind.start = lambda *_: None


def run_config(base: Path, data: Path, out: Path, method: str, **changes):
    settings = dict(adapter=METHODS[method], max_steps=4, lr=2e-3, schedule="constant", packing=True, batch_size=4)
    return replace(small_config(base, data, out), **settings | changes)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_training_and_resuming_and_merging(any_base, data, tmp_path, method, monkeypatch):
    config = run_config(any_base, data, tmp_path / "run", method, val_split=0.2)
    result = quiet_train(config)
    assert result.best_val_loss < result.base_val_loss
    saved = adapter(config.out)
    first = replace(config, out=str(tmp_path / "parts"), max_steps=2)
    quiet_train(first)
    with monkeypatch.context() as patch:
        patch.setattr(type(find_methods(method)[0]), "start", lambda *_: None)  # all comes from the checkpoint
        quiet_train(replace(first, max_steps=4, resume="auto"))
    assert losses(first.out) == losses(config.out)
    assert all(torch.equal(tensor, adapter(first.out)[key]) for key, tensor in saved.items())

    before = any_base.read_bytes()
    report = merge(any_base, config.out, tmp_path / "merged.pth")
    assert any_base.read_bytes() == before
    assert report.logits_error < 1e-5 < report.logits_effect
    with torch.no_grad():
        adapted = load_adapter(load_model(any_base), config.out).eval()(TOKENS)[0]
        torch.testing.assert_close(load_model(tmp_path / "merged.pth")(TOKENS)[0], adapted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_beside_a_state(make_config, tmp_path, method):
    several = replace(METHODS[method], method=f"{method}+state", target_modules=["att.key"], modules_to_save=["ln"])
    config = make_config(adapter=several, max_steps=2, lr_state=0.1, packing=True)
    quiet_train(config)
    report = merge(config.base, config.out, tmp_path / "merged.pth")
    assert report.logits_error < 1e-5
    assert {"blocks.0.att.key", "blocks.0.att.time_state", "ln_out.weight"} <= {layer.name for layer in report.layers}


@pytest.mark.slow
@pytest.mark.parametrize("any_base", [6, 7], indirect=True, ids=["RWKV-6", "RWKV-7"])
def test_zero_2_gives_the_run_of_one_process(any_base, data, tmp_path, monkeypatch):
    """Two ranks, stopped and resumed, with each method beside some of the linears."""
    each = AdapterConfig("lora", r=4, method_pattern={"ffn[.]key": "dora", "ffn[.]value": "pissa"})
    each.options = {"alpha": 4.0, "lr_ratio": 4.0}
    one = run_config(any_base, data, tmp_path / "one", "lora", adapter=each)
    quiet_train(one)
    two = replace(one, out=str(tmp_path / "two"), strategy="deepspeed_stage_2", devices=2, batch_size=2)
    for config, before in ((replace(two, max_steps=2), None), (replace(two, resume="auto"), without_start)):
        done = run_train(config, before)
        assert done.returncode == 0, done.stderr
    assert losses(two.out) == pytest.approx(losses(one.out), rel=1e-5)
    for name, tensor in adapter(two.out).items():
        torch.testing.assert_close(tensor, adapter(one.out)[name], rtol=2e-3, atol=5e-5)
    # What DeepSpeed keeps in parts comes from the adapter's folder where one process goes on.
    for kind in (Dora, LowRank, Pissa):
        monkeypatch.setattr(kind, "start", lambda *_: None)
    quiet_train(replace(one, out=two.out, max_steps=5, resume="auto"))
    assert losses(two.out)[:4] == pytest.approx(losses(one.out), rel=1e-5) and len(losses(two.out)) == 5
