"""The model that the tests serve."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session")
def base(tmp_path_factory, random_weights) -> Path:
    """A random RWKV-7 with the vocabulary of the bytes."""
    path = tmp_path_factory.mktemp("served") / "base.pth"
    torch.save(random_weights(n_layer=2, vocab_size=256), path)
    return path
