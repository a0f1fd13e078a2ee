"""A version is one file and one line of a table: the toy is made, recognised, trained, resumed and merged."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rwkv_miss import AdapterConfig, load_adapter, load_model, merge
from rwkv_miss.checkpoint import TensorSpec, read_checkpoint, write_pth
from rwkv_miss.cli import main
from rwkv_miss.model.state import State
from rwkv_miss.model.versions import MODELS
from tests.doors.toy_version import DeepRWKV7
from tests.training.runs import losses, quiet_train, resumes_to_the_same_run, small_config

TOKENS = torch.randint(256, (2, 13), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    """Puts the toy first in the table: RWKV-7 would recognise its files too."""
    rest = dict(MODELS)
    MODELS.clear()
    MODELS.update({DeepRWKV7.version: DeepRWKV7} | rest)
    yield
    MODELS.clear()
    MODELS.update(rest)


@pytest.fixture
def base(tmp_path) -> Path:
    """Written by `init`, then with noise added: initially no block adds anything."""
    sizes = ["--n_layer=2", "--n_embd=32", "--head_size=16", "--vocab_size=256", "--dtype=fp32"]
    assert main(["init", "--version=7-deep", *sizes, f"--out={tmp_path / 'new.pth'}"]) == 0
    rng = torch.Generator().manual_seed(1)
    weights = {
        k: t + 0.1 * torch.randn(t.shape, generator=rng) for k, t in read_checkpoint(tmp_path / "new.pth").items()
    }
    path = tmp_path / "base.pth"
    write_pth(path, {k: TensorSpec(t.shape, t.dtype) for k, t in weights.items()}, weights.__getitem__)
    return path


@torch.no_grad()
def test_it_is_recognised_and_its_embedding_matters(base, capsys):
    model = load_model(base)
    assert type(model) is DeepRWKV7 and model.config.version == "7-deep"
    assert main(["info", str(base)]) == 0
    assert "model        RWKV-7-deep" in capsys.readouterr().out
    before = model(TOKENS)[0]
    model.blocks[1].ffn.s_emb.weight[TOKENS[0, 0]] += 1.0
    assert not torch.equal(model(TOKENS)[0], before)


@torch.no_grad()
def test_its_state_goes_on(base, tmp_path):
    model = load_model(base)
    whole, _ = model(TOKENS)
    _, state = model(TOKENS[:, :5])
    state.save(tmp_path / "state.safetensors")
    rest, _ = model(TOKENS[:, 5:], State.load(tmp_path / "state.safetensors"))
    torch.testing.assert_close(rest, whole[:, 5:], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "adapter",
    [AdapterConfig(r=4), AdapterConfig("miss+state", r=4, modules_to_save=["ffn.s_emb"]), AdapterConfig("full")],
    ids=lambda x: x.method,
)
def test_it_trains_resumes_and_merges(base, data, tmp_path, adapter):
    config = replace(small_config(base, data, tmp_path / "run"), adapter=adapter, packing=True, schedule="constant")
    config = replace(config, lr=2e-3, gradient_checkpointing=True, max_steps=4)
    quiet_train(config)
    assert losses(config.out)[-1] < losses(config.out)[0]
    resumes_to_the_same_run(config, tmp_path / "parts")
    merge(base, config.out, tmp_path / "merged.pth")
    adapted = load_adapter(load_model(base), config.out)
    with torch.no_grad():
        torch.testing.assert_close(
            load_model(tmp_path / "merged.pth")(TOKENS)[0], adapted(TOKENS)[0], rtol=0, atol=1e-5
        )
