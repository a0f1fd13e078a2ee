"""The initial weights: they fit the model, depend on the seed, have the values that BlinkDL's code starts from, and the
file that is written runs elsewhere and can be trained."""

from __future__ import annotations

import math
import os
import sys

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from rwkv_miss.checkpoint import read_checkpoint
from rwkv_miss.config import ModelConfig
from rwkv_miss.errors import UserError
from rwkv_miss.model.init import init_weights, new_config, write_initial
from rwkv_miss.model.load import load_model
from rwkv_miss.model.recognise import infer_config
from rwkv_miss.model.versions import MODELS
from tests.processes import run_process

CONFIG6 = ModelConfig(6, 4, 64, 2, 32, 224, 256, {"maa": 5, "decay": 7})
CONFIG = ModelConfig(7, 4, 64, 2, 32, 224, 256, {"w": 5, "a": 6, "v": 3, "g": 80})


both = pytest.mark.parametrize("config", [CONFIG6, CONFIG], ids=["v6", "v7"])


@both
def test_fits_the_model_and_says_its_sizes(config):
    weights = init_weights(config, seed=1)
    MODELS[config.version](config).load_state_dict(weights, strict=True)
    assert infer_config(weights, "weights") == config
    assert {w.dtype for w in weights.values()} == {torch.float32}


@pytest.mark.parametrize("version", [6, 7])
def test_one_layer(tmp_path, version):
    config = new_config(version, 1, 32, 64, head_size=32)
    write_initial(config, 1, tmp_path / "new.pth", "fp32")
    weights = read_checkpoint(tmp_path / "new.pth")
    assert infer_config(weights, "weights") == config
    assert all(w.isfinite().all() for w in weights.values())


@both
def test_the_seed_decides(config):
    first, again, other = (init_weights(config, seed) for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])


@both
def test_starts_finite_as_the_identity_and_learns(config):
    """Every block adds zero at first; so the logits are the head of the normed embedding, and a step of SGD
    reaches the output matrices."""
    model = MODELS[config.version](config, wkv_backend="reference")
    model.load_state_dict(init_weights(config, seed=1))
    tokens = torch.arange(24).view(2, 12)
    logits, _ = model(tokens)
    with torch.no_grad():
        expected = model.head(model.ln_out(model.blocks[0].ln0(model.emb(tokens))))
    torch.testing.assert_close(logits, expected)
    assert logits.isfinite().all() and logits.std() > 0.1
    cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
    for block in model.blocks:
        assert block.att.output.weight.grad.abs().sum() > 0
        assert block.ffn.value.weight.grad.abs().sum() > 0


# Worked out by hand from the formulas in BlinkDL's RWKV-LM (RWKV-v7/train_temp/src/model.py, RWKV-v5/src/model.py), for
# 4 layers, C 64, N 32.
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
def test_values_of_7(name, channel, value):
    assert init_weights(CONFIG, seed=1)[name].flatten()[channel].item() == pytest.approx(value, abs=1e-5)


@pytest.mark.parametrize(
    ("name", "channel", "value"),
    [
        ("blocks.0.att.time_decay", 0, -6),
        ("blocks.0.att.time_decay", 32, -6 + 5 * (32 / 63) ** 0.7),
        ("blocks.1.att.time_decay", 32, -6 + 5 * (32 / 63) ** (0.7 + 1.3 / 3)),
        ("blocks.3.att.time_decay", 63, -1),
        ("blocks.0.att.time_faaaa", 0, 0),
        ("blocks.0.att.time_faaaa", 1, 0.1),
        ("blocks.0.att.time_faaaa", 2, -0.1),
        ("blocks.3.att.time_faaaa", 4, 1 - 4 / 63 + 0.1),
        ("blocks.1.att.time_faaaa", 63, 0),
        ("blocks.2.att.time_maa_x", 16, 1 - 0.25**0.5),
        ("blocks.2.att.time_maa_w", 16, 1 - 0.25**0.5),
        ("blocks.0.att.time_maa_k", 16, 1 - 0.25),
        ("blocks.0.att.time_maa_v", 16, 1 - 0.25),
        ("blocks.3.att.time_maa_v", 16, 1 - 0.25**0.25 - 0.3),
        ("blocks.2.att.time_maa_r", 16, 1 - 0.25**0.25),
        ("blocks.2.att.time_maa_g", 16, 1 - 0.25**0.25),
        ("blocks.2.ffn.time_maa_k", 32, 1 - 0.5**0.125),
        ("blocks.2.ffn.time_maa_r", 32, 1 - 0.5**0.125),
        ("blocks.1.att.ln_x.weight", 7, 0.5**0.7),
        ("blocks.1.att.time_maa_w1", 3, 0),
        ("blocks.1.att.time_decay_w1", 3, 0),
    ],
)
def test_values_of_6(name, channel, value):
    assert init_weights(CONFIG6, seed=1)[name].flatten()[channel].item() == pytest.approx(value, abs=1e-5)


@pytest.mark.parametrize(
    ("config", "name", "most"),
    [
        (CONFIG, "emb.weight", 1e-4),
        (CONFIG6, "emb.weight", 1e-4),
        (CONFIG6, "blocks.1.att.time_maa_w2", 0.01),
        (CONFIG6, "blocks.1.att.time_decay_w2", 0.01),
    ],
)
def test_uniform(config, name, most):
    weight = init_weights(config, seed=1)[name]
    assert 0.98 * most < weight.abs().max() <= most
    assert weight.std().item() == pytest.approx(most / math.sqrt(3), rel=0.1)
    assert weight.mean().abs() < 0.1 * most


@pytest.mark.parametrize(
    ("config", "name", "gain"),
    [
        (CONFIG, "head.weight", 0.5 * math.sqrt(256 / 64)),
        (CONFIG, "blocks.1.att.receptance.weight", 1.0),
        (CONFIG, "blocks.1.att.key.weight", 0.1),
        (CONFIG, "blocks.1.att.value.weight", 1.0),
        (CONFIG, "blocks.1.att.output.weight", 0.0),
        (CONFIG, "blocks.1.ffn.key.weight", 1.0),
        (CONFIG, "blocks.1.ffn.value.weight", 0.0),
        (CONFIG, "blocks.1.att.w2", 0.1),
        (CONFIG, "blocks.1.att.g2", 0.1 * math.sqrt(80 / 64)),
        (CONFIG6, "head.weight", 0.5 * math.sqrt(256 / 64)),
        (CONFIG6, "blocks.1.att.receptance.weight", 1.0),
        (CONFIG6, "blocks.1.att.key.weight", 0.1),
        (CONFIG6, "blocks.1.att.value.weight", 1.0),
        (CONFIG6, "blocks.1.att.gate.weight", 0.1),
        (CONFIG6, "blocks.1.att.output.weight", 0.0),
        (CONFIG6, "blocks.1.ffn.key.weight", 1.0),
        (CONFIG6, "blocks.1.ffn.receptance.weight", 0.0),
        (CONFIG6, "blocks.1.ffn.value.weight", 0.0),
    ],
)
def test_orthogonal_matrices(config, name, gain):
    singular = torch.linalg.svdvals(init_weights(config, seed=1)[name])
    torch.testing.assert_close(singular, torch.full_like(singular, gain))


def test_decay_range_of_7():
    """A step keeps between exp(-e^-0.5 sigmoid(3)) = 0.56 and exp(-e^-0.5 sigmoid(-8)) = 0.9998."""
    weights = init_weights(CONFIG, seed=1)
    decay = torch.cat([torch.exp(-math.exp(-0.5) * torch.sigmoid(weights[f"blocks.{i}.att.w0"])) for i in range(4)])
    assert decay.min() == pytest.approx(0.561, abs=1e-3)
    assert decay.max() == pytest.approx(0.9998, abs=1e-4)


def test_decay_range_of_6():
    """A step keeps between exp(-exp(-1)) = 0.69 and exp(-exp(-6)) = 0.998."""
    weights = init_weights(CONFIG6, seed=1)
    decay = torch.cat([torch.exp(-torch.exp(weights[f"blocks.{i}.att.time_decay"])) for i in range(4)])
    assert decay.min() == pytest.approx(math.exp(-math.exp(-1)), abs=1e-4)
    assert decay.max() == pytest.approx(math.exp(-math.exp(-6)), abs=1e-4)


# The sizes of the published World models: RWKV-7 0.1B and 2.9B, RWKV-6 1.6B and 7B.
@pytest.mark.parametrize(
    ("version", "n_embd", "dim_ffn", "low_rank"),
    [
        (7, 768, 3072, {"w": 64, "a": 64, "v": 32, "g": 128}),
        (7, 2560, 10240, {"w": 128, "a": 128, "v": 96, "g": 256}),
        (6, 2048, 7168, {"maa": 32, "decay": 64}),
        (6, 4096, 14336, {"maa": 64, "decay": 128}),
    ],
)
def test_sizes_that_are_not_given(version, n_embd, dim_ffn, low_rank):
    config = new_config(version, 24, n_embd, 65536)
    assert (config.n_head, config.head_size, config.dim_ffn) == (n_embd // 64, 64, dim_ffn)
    assert config.low_rank == low_rank
    assert new_config(version, 24, n_embd, 65536, low_rank=dict.fromkeys(low_rank, 7)).low_rank == dict.fromkeys(
        low_rank, 7
    )


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"n_layer": 0, "vocab_size": -1}, ["n_layer is 0", "vocab_size is -1"]),
        ({"n_embd": 96}, ["n_embd 96 is not divisible by head_size 64"]),
        ({"n_embd": 0}, ["n_embd is 0"]),
        ({"head_size": 0}, ["head_size is 0"]),
        ({"dim_ffn": 0}, ["dim_ffn is 0"]),
        ({"low_rank": {"maa": 32}}, ["'maa'", "w, a, v, g"]),
        ({"low_rank": {"w": 0}}, ["low_rank.w is 0"]),
        ({"version": 5}, ["version is 5"]),
    ],
)
def test_sizes_that_no_model_has(changes, parts):
    with pytest.raises(UserError) as error:
        new_config(**{"version": 7, "n_layer": 2, "n_embd": 64, "vocab_size": 256} | changes)
    assert all(part in str(error.value) for part in parts), error.value


@both
def test_the_written_file_is_the_weights(config, tmp_path):
    n = write_initial(config, 3, tmp_path / "new.pth", "bf16")
    weights, written = init_weights(config, 3), read_checkpoint(tmp_path / "new.pth")
    # RWKV-7's first layer has no use for v0, v1 and v2, but BlinkDL's trainer asks for them.
    unused = [f"blocks.0.att.v{i}" for i in range(3)] if config.version == 7 else []
    assert list(written) == [*weights, *unused] and n == sum(w.numel() for w in written.values())
    assert [written[key].shape for key in unused] == [written[key.replace("0", "1", 1)].shape for key in unused]
    assert all(torch.equal(written[name], w.bfloat16()) for name, w in weights.items())
    with pytest.raises(UserError, match=r"new\.pth: exists already"):
        write_initial(config, 3, tmp_path / "new.pth", "bf16")
    with pytest.raises(UserError, match=r"new\.st: .* \.pth"):
        write_initial(config, 3, tmp_path / "new.st", "bf16")


def test_a_full_disk_leaves_nothing(tmp_path, full_disk):
    with full_disk(100_000), pytest.raises(UserError, match="cannot be written"):
        write_initial(CONFIG, 3, tmp_path / "new.pth", "bf16")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@torch.no_grad()
@both
def test_the_rwkv_package_runs_the_file(config, tmp_path):
    """Once as written, where no block adds anything, and once with noise, so that every matrix matters."""
    pytest.importorskip("rwkv")
    write_initial(config, 1, tmp_path / "new.pth", "fp32")
    weights, rng = read_checkpoint(tmp_path / "new.pth"), torch.Generator().manual_seed(2)
    torch.save({k: w + 0.05 * torch.randn(w.shape, generator=rng) for k, w in weights.items()}, tmp_path / "noisy.pth")
    code = (
        "import sys, numpy, rwkv.model\n"
        "for path in sys.argv[1:]:\n"
        "    model = rwkv.model.RWKV(model=path, strategy='cpu fp32')\n"
        "    numpy.save(path, model.forward(list(range(7, 40)), None, full_output=True)[0].numpy())\n"
    )
    paths = [tmp_path / "new", tmp_path / "noisy"]
    env = os.environ | {"RWKV_V7_ON": "1" if config.version == 7 else "0", "RWKV_JIT_ON": "0"}
    done = run_process([sys.executable, "-c", code, *map(str, paths)], timeout=120, env=env)
    assert done.returncode == 0, done.stderr
    ours = []
    for path in paths:
        ours.append(load_model(f"{path}.pth")(torch.arange(7, 40)[None])[0][0])
        assert (ours[-1] - torch.from_numpy(np.load(f"{path}.npy"))).abs().max() < 1e-4
    alone = load_model(paths[1].with_suffix(".pth"))(torch.tensor([[39]]))[0][0, 0]
    assert (ours[1][-1] - alone).abs().max() > 0.1, "what came before must matter"


@both
def test_a_few_steps_learn(config, tmp_path):
    """Trains every parameter on the same four sequences."""
    write_initial(config, 1, tmp_path / "new.pth", "fp32")
    model = load_model(tmp_path / "new.pth")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    rng = torch.Generator().manual_seed(3)
    once = torch.randint(256, (4, 12), generator=rng)
    tokens = torch.cat([once, once], 1)
    losses = []
    for _ in range(40):
        loss = cross_entropy(model(tokens[:, :-1])[0].flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > math.log(256) - 0.2 and losses[-1] < 0.5 * losses[0]
