"""The initial weights: they fit the model, are those of the seed, and have the values that RWKV-7 starts from."""

from __future__ import annotations

import math

import pytest
import torch

from rwkv_miss.checkpoint import infer_config
from rwkv_miss.config import ModelConfig
from rwkv_miss.model.init import init_weights
from rwkv_miss.model.rwkv7 import RWKV7

CONFIG = ModelConfig(7, 4, 64, 2, 32, 224, 256, {"w": 5, "a": 6, "v": 3, "g": 80})


def test_fits_the_model_and_says_its_sizes():
    weights = init_weights(CONFIG, seed=1)
    RWKV7(CONFIG).load_state_dict(weights, strict=True)
    assert infer_config(weights, "weights") == CONFIG
    assert {w.dtype for w in weights.values()} == {torch.float32}


def test_one_layer():
    config = ModelConfig(7, 1, 32, 1, 32, 128, 64, {"w": 4, "a": 4, "g": 4})
    assert all(w.isfinite().all() for w in init_weights(config, seed=1).values())


def test_the_seed_decides():
    first, again, other = (init_weights(CONFIG, seed) for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])


def test_starts_finite_as_the_identity_and_learns():
    """Every block adds zero at first; so the logits are the head of the normed embedding, and a step of SGD
    reaches the output matrices."""
    model = RWKV7(CONFIG, wkv_backend="reference")
    model.load_state_dict(init_weights(CONFIG, seed=1))
    tokens = torch.arange(24).view(2, 12)
    logits, _ = model(tokens)
    with torch.no_grad():
        expected = model.head(model.ln_out(model.blocks[0].ln0(model.emb(tokens))))
    torch.testing.assert_close(logits, expected)
    assert logits.isfinite().all() and logits.std() > 0.1
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
    for block in model.blocks:
        assert block.att.output.weight.grad.abs().sum() > 0
        assert block.ffn.value.weight.grad.abs().sum() > 0


# Worked out by hand from the formulas in BlinkDL's RWKV-v7/train_temp/src/model.py, for 4 layers, C 64, N 32.
@pytest.mark.parametrize(
    ("name", "channel", "value"),
    [
        ("blocks.0.att.w0", 0, -6 + 0.5 - 2.5),
        ("blocks.0.att.w0", 31, -6 + 6 * 31 / 63 + 0.5 + 2.5),
        ("blocks.3.att.w0", 63, 0 + 0.5 + 2.5),
        ("blocks.3.att.w0", 32, -6 + 6 * (32 / 63) ** 2 + 0.5 - 2.5),
        ("blocks.1.att.w0", 32, -6 + 6 * (32 / 63) ** (1 + (1 / 3) ** 0.3) + 0.5 - 2.5),
        ("blocks.1.att.a0", 0, -0.19 - 0.3 - 0.2),
        ("blocks.1.att.v0", 63, 0.73 - 0.2),
        ("blocks.1.att.k_k", 0, 0.71 + 0.05),
        ("blocks.2.att.x_k", 16, 1 - 0.25**0.35),
        ("blocks.0.att.x_g", 32, 1 - 0.5**0.2),
        ("blocks.2.ffn.x_k", 32, 1 - 0.5 ** (1 / 16)),
        ("blocks.1.att.ln_x.weight", 7, 0.5**0.7),
    ],
)
def test_values(name, channel, value):
    assert init_weights(CONFIG, seed=1)[name].flatten()[channel].item() == pytest.approx(value, abs=1e-5)


@pytest.mark.parametrize(
    ("name", "gain"),
    [
        ("head.weight", 0.5 * math.sqrt(256 / 64)),
        ("blocks.1.att.key.weight", 0.1),
        ("blocks.1.ffn.key.weight", 1.0),
        ("blocks.1.att.w2", 0.1),
        ("blocks.1.att.g2", 0.1 * math.sqrt(80 / 64)),
    ],
)
def test_orthogonal_matrices(name, gain):
    singular = torch.linalg.svdvals(init_weights(CONFIG, seed=1)[name])
    torch.testing.assert_close(singular, torch.full_like(singular, gain))


def test_decay_range():
    """A step keeps between exp(-e^-0.5 sigmoid(3)) = 0.56 and exp(-e^-0.5 sigmoid(-8)) = 0.9998."""
    weights = init_weights(CONFIG, seed=1)
    decay = torch.cat([torch.exp(-math.exp(-0.5) * torch.sigmoid(weights[f"blocks.{i}.att.w0"])) for i in range(4)])
    assert decay.min() == pytest.approx(0.561, abs=1e-3)
    assert decay.max() == pytest.approx(0.9998, abs=1e-4)
