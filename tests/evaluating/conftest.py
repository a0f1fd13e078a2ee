from __future__ import annotations

import pytest
import torch

from rwkv_miss import load_model


@pytest.fixture
def model(make_base):
    """Of random weights, for the tokenizer `bytes`."""
    return load_model(make_base(vocab_size=256), torch.float64)
