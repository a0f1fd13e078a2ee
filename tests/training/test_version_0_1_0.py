"""A run saved by version 0.1.0 can be resumed and merged.

version_0_1_0/run is a run of `train --adapter.method miss+state ...` (run/config.yaml has its settings) that was
stopped at step 3 of 6, version_0_1_0/whole the same run without a stop; base.pth was written by its `init`."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import yaml

from rwkv_miss import AdapterConfig, TrainConfig, load_adapter, load_model, merge
from rwkv_miss.errors import UserError
from tests.training.runs import adapter, losses, quiet_train

SAVED = Path(__file__).parent / "version_0_1_0"


@pytest.fixture
def config(tmp_path, monkeypatch) -> TrainConfig:
    shutil.copytree(SAVED, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    settings = yaml.safe_load(Path("run/config.yaml").read_text())
    settings["adapter"], settings["betas"] = AdapterConfig(**settings["adapter"]), tuple(settings["betas"])
    return TrainConfig(**settings | {"max_steps": 6, "resume": "auto", "allow_dropping": True})


def test_it_goes_on_as_it_would_have(config):
    config.answer_lines, config.answer_end = "join", "blank_line"  # as version 0.1.0 always did
    assert quiet_train(config).steps == 6
    assert losses("run") == pytest.approx(losses("whole"), rel=1e-5)
    for name, tensor in adapter("whole").items():
        torch.testing.assert_close(adapter("run")[name], tensor, rtol=1e-4, atol=1e-6)


def test_it_does_not_go_on_with_other_answers(config):
    with pytest.raises(UserError, match="answer_lines was join, is keep; answer_end was blank_line, is token"):
        quiet_train(config)


@torch.no_grad()
def test_it_merges(config):
    merge(config.base, "whole", "merged.pth", "fp32")
    tokens = torch.arange(40, 60)[None]
    adapted = load_adapter(load_model(config.base, "fp32"), "whole")
    torch.testing.assert_close(load_model("merged.pth")(tokens)[0], adapted(tokens)[0], rtol=0, atol=1e-5)
