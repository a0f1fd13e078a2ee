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
from rwkv_miss.model.init import init_weights
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
