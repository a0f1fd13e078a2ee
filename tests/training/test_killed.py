"""kill -9 at any moment loses nothing that was saved, and the resumed run is the uninterrupted one."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rwkv_miss.adapters.files import WEIGHTS
from rwkv_miss.config import AdapterConfig
from rwkv_miss.training.checks import last_checkpoint
from tests.processes import run_process
from tests.training.runs import losses

TRIALS = 20


@pytest.mark.slow
def test_twenty_of_twenty_runs_that_are_killed_end_as_if_they_had_not_been(make_config, tmp_path):
    dropping = AdapterConfig(r=4, dropout=0.1)
    config = make_config(
        out=str(tmp_path), adapter=dropping, batch_size=2, accumulate=2, val_split=0.2, val_every=2, save_every=1
    )
    config = replace(config, max_steps=12, lr=0.1)  # two epochs of 6 steps; validations that get worse again
    (tmp_path / "settings.json").write_text(json.dumps(asdict(config)))
    command = [sys.executable, "-m", "tests.training.on_killed", str(tmp_path / "settings.json"), str(TRIALS)]
    done = run_process(command, timeout=600)
    assert done.returncode == 0, done.stderr
    after_a_checkpoint = re.findall(r": killed with \['", done.stdout)
    assert len(after_a_checkpoint) >= TRIALS // 2, done.stdout
    straight = tmp_path / "straight"
    for i in range(TRIALS):
        out = tmp_path / f"killed-{i}"
        for column in ("loss", "val_loss", "lr", "tokens"):
            assert losses(out, column) == losses(straight, column), (i, column)
        for name in ("adapter", "adapter_last"):
            assert equal(load_file(out / name / WEIGHTS), load_file(straight / name / WEIGHTS)), (i, name)
        states = [torch.load(last_checkpoint(x / "checkpoints")[0], weights_only=True) for x in (out, straight)]
        for part in ("state_dict", "optimizer_states", "lr_schedulers"):
            assert equal(*(state[part] for state in states)), (i, part)
        assert not [path for path in Path(out).rglob("*.part")], i


def equal(a: object, b: object) -> bool:
    """Whether two nests of containers are equal, tensors to the bit."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(equal(value, b[key]) for key, value in a.items())
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a == b
