"""A run small enough to be made many times: a random RWKV-7 and a few questions of uneven length, in bytes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rwkv_miss.checkpoint import TensorSpec, write_pth
from rwkv_miss.config import ModelConfig, TrainConfig
from rwkv_miss.model.init import init_weights, new_config
from tests.training.runs import small_config

SIZES = ModelConfig(7, 2, 32, 2, 16, 64, 256, {"w": 8, "a": 8, "g": 8, "v": 8})


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    """A random RWKV-7 in fp32: 2 layers of 32, 2 heads of 16, 256 tokens."""
    path = tmp_path_factory.mktemp("base") / "base.pth"
    weights = init_weights(SIZES, seed=0)
    generator = torch.Generator().manual_seed(1)
    # The initial head and output projections are near zero; noise makes every part affect the logits.
    weights = {k: w + 0.1 * torch.randn(w.shape, generator=generator) for k, w in weights.items()}
    write_pth(path, {k: TensorSpec(w.shape, w.dtype) for k, w in weights.items()}, weights.__getitem__)
    return path


@pytest.fixture(scope="session", params=[6, 7])
def any_base(request, tmp_path_factory) -> Path:
    """A random model of each version in fp32: 2 layers of 32, 2 heads of 16, 256 tokens."""
    config = new_config(request.param, 2, 32, 256, head_size=16)
    rng = torch.Generator().manual_seed(1)
    weights = {k: w + 0.1 * torch.randn(w.shape, generator=rng) for k, w in init_weights(config, seed=0).items()}
    path = tmp_path_factory.mktemp("any_base") / f"rwkv{request.param}.pth"
    write_pth(path, {k: TensorSpec(w.shape, w.dtype) for k, w in weights.items()}, weights.__getitem__)
    return path


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """29 questions whose answers have 1 to 29 words: micro-batches differ much in their loss tokens."""
    path = tmp_path_factory.mktemp("data") / "questions.jsonl"
    records = [{"question": f"count {n}", "answer": " ".join(["tick"] * n)} for n in range(1, 30)]
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


@pytest.fixture
def make_config(base, data, tmp_path) -> Callable[..., TrainConfig]:
    """`small_config` into tmp_path/run, with the changes given."""
    return lambda **changes: replace(small_config(base, data, tmp_path / "run"), **changes)
