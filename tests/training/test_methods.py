"""Runs that train a state, parts of the base, or all of it: on several ranks, resumed, in bf16."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rwkv_miss import load_adapter, load_model, merge
from rwkv_miss.checkpoint import TensorSpec, read_checkpoint, write_pth
from rwkv_miss.config import AdapterConfig
from rwkv_miss.errors import RunError, UserError
from rwkv_miss.ops import log_probs
from rwkv_miss.training import strategies
from tests.training.runs import adapter, losses, quiet_train, run_train

METHODS = {
    "state": AdapterConfig("state"),
    "parts": AdapterConfig("miss+state", r=4, modules_to_save=["ln", "time", "emb", "head"]),
    "full": AdapterConfig("full"),
}
# The whole base alone is left to the whole suite where a test runs several times: "parts" trains most of what it does.
FEW = ["state", "parts", pytest.param("full", marks=pytest.mark.slow)]


@pytest.fixture
def method_config(make_config):
    """`method_config(method, **changes)`: a short run of packed rows, so that documents begin inside rows."""

    def make(method: str, **changes):
        lr = 1.0 if method == "state" else 2e-3
        settings = dict(adapter=METHODS[method], packing=True, max_steps=3, batch_size=2, lr=lr, weight_decay=0.1)
        return make_config(**settings | changes)

    return make


@pytest.mark.parametrize("method", METHODS)
def test_training_lowers_the_loss_and_changes_everything_it_trains(method_config, method):
    config = method_config(method, max_steps=8, packing=False, batch_size=8)
    quiet_train(config)
    found = losses(config.out)
    assert found[-1] < 0.97 * found[0]
    base, saved = load_model(config.base), adapter(config.out)
    for key, tensor in saved.items():
        name = key.removeprefix("base_model.model.")
        before = dict(base.named_parameters()).get(name, torch.zeros_like(tensor))
        assert not torch.equal(tensor, before), key
    assert {t.dtype for t in saved.values()} == {torch.float32}
    if method == "full":
        assert {k.removeprefix("base_model.model.") for k in saved} == {n for n, _ in base.named_parameters()}


@pytest.mark.parametrize("method", FEW)
def test_gradient_checkpointing_gives_the_same_run(method_config, method, tmp_path, recomputed_blocks):
    one = method_config(method, precision="bf16")
    two = replace(one, out=str(tmp_path / "two"), gradient_checkpointing=True)
    quiet_train(one)
    assert not recomputed_blocks
    quiet_train(two)
    assert recomputed_blocks
    assert losses(one.out) == losses(two.out)
    assert all(torch.equal(t, adapter(one.out)[n]) for n, t in adapter(two.out).items())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "method", "precision"),
    [
        ("ddp", "parts", "bf16"),
        ("deepspeed_stage_1", "full", "bf16"),
        ("deepspeed_stage_2", "parts", "fp32"),
        ("deepspeed_stage_3", "parts", "bf16"),
        ("deepspeed_stage_3", "full", "fp32"),
    ],
)
def test_strategies_give_the_run_of_one_process(method_config, method, strategy, precision, tmp_path):
    one = method_config(method, precision=precision, batch_size=4)
    quiet_train(one)
    two = replace(one, out=str(tmp_path / "two"), strategy=strategy, devices=2, batch_size=2)
    done = run_train(two)
    assert done.returncode == 0, done.stderr
    tolerance = dict(rtol=2e-3, atol=2e-5) if precision == "fp32" else dict(rtol=0.02, atol=4e-3)
    assert losses(two.out) == pytest.approx(losses(one.out), rel=2e-5 if precision == "fp32" else 5e-3)
    expected = adapter(one.out)
    assert expected.keys() == adapter(two.out).keys()
    for name, tensor in adapter(two.out).items():
        torch.testing.assert_close(tensor, expected[name], **tolerance)


@pytest.mark.parametrize("method", FEW)
def test_resume_gives_the_uninterrupted_run(method_config, method, tmp_path):
    straight = method_config(method, schedule="constant", precision="bf16", max_steps=4)
    quiet_train(straight)
    first = replace(straight, out=str(tmp_path / "parts"), max_steps=2)
    quiet_train(first)
    quiet_train(replace(first, max_steps=4, resume="auto"))
    assert losses(first.out) == losses(straight.out)
    assert all(torch.equal(t, adapter(straight.out)[n]) for n, t in adapter(first.out).items())
    with pytest.raises(UserError, match="precision was bf16, is fp32"):
        quiet_train(replace(first, max_steps=5, resume="auto", precision="fp32"))


def loss_in_pieces() -> None:
    """A large vocabulary's logits are computed in pieces, whose number differs between ranks."""
    log_probs._MAX_LOGITS = 256 * 20


def no_weight_whole() -> None:
    """DeepSpeed keeps parameters below this size whole on every rank, which all of this model's are."""
    build = strategies.build

    def changed(*arguments):
        strategy, plugins = build(*arguments)
        strategy.config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return strategy, plugins

    strategies.build = changed


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("patch", [loss_in_pieces, no_weight_whole])
@pytest.mark.parametrize("method", ["miss", "full"])
def test_zero_3_of_what_only_a_large_model_has(method_config, tmp_path, method, patch, checkpointing):
    config = AdapterConfig("full") if method == "full" else AdapterConfig(r=4)
    one = method_config("full", adapter=config, precision="bf16", batch_size=4, max_steps=2)
    quiet_train(one)
    two = replace(one, out=str(tmp_path / "two"), strategy="deepspeed_stage_3", devices=2, batch_size=2)
    two = replace(two, gradient_checkpointing=checkpointing, sample_every=9, sample_tokens=2)
    done = run_train(two, before=patch)
    assert done.returncode == 0, done.stderr
    assert losses(two.out) == pytest.approx(losses(one.out), rel=5e-3)
    for name, tensor in adapter(two.out).items():
        torch.testing.assert_close(tensor, adapter(one.out)[name], rtol=0.02, atol=4e-3)


@pytest.mark.slow
def test_resume_under_deepspeed(method_config, tmp_path):
    """Against one uninterrupted process. With a fresh optimizer the last step would differ."""
    straight = method_config("parts", schedule="constant", precision="bf16")
    quiet_train(straight)
    first = replace(straight, out=str(tmp_path / "parts"), max_steps=2, strategy="deepspeed_stage_3")
    for config in (first, replace(first, max_steps=3, resume="auto")):
        done = run_train(config)
        assert done.returncode == 0, done.stderr
    assert losses(first.out) == pytest.approx(losses(straight.out), rel=5e-3)
    for name, tensor in adapter(first.out).items():
        torch.testing.assert_close(tensor, adapter(straight.out)[name], rtol=0.02, atol=5e-4)


@pytest.mark.parametrize("method", METHODS)
def test_checkpoints_hold_only_what_is_trained(method_config, method):
    config = method_config(method, max_steps=1, precision="bf16")
    quiet_train(config)
    saved = torch.load(Path(config.out) / "checkpoints/step-00000001", weights_only=False)["state_dict"]
    assert len(saved) == len(adapter(config.out)) and {t.dtype for t in saved.values()} == {torch.float32}


def test_updates_smaller_than_bf16_can_hold_are_kept(method_config):
    config = method_config("full", precision="bf16", lr=1e-6, max_steps=2)
    quiet_train(config)
    base = load_model(config.base)
    for key, tensor in adapter(config.out).items():
        before = base.get_parameter(key.removeprefix("base_model.model."))
        assert 0 < (tensor - before).abs().max() < 1e-4, key


@torch.no_grad()
@pytest.mark.parametrize("method", FEW)
def test_the_best_loss_is_that_of_the_merged_file(method_config, method, tmp_path):
    """What a run validated is what its adapter folder and the merged file compute."""
    config = method_config(method, val_split=0.2)
    result = quiet_train(config)
    folder, merged = Path(config.out) / "adapter", tmp_path / "merged.pth"
    merge(config.base, folder, merged)
    tokens = torch.randint(256, (2, 33), generator=torch.Generator().manual_seed(0))
    logits = [load_adapter(load_model(config.base), folder)(tokens)[0], load_model(merged)(tokens)[0]]
    assert (logits[0] - logits[1]).abs().max() < 1e-5 * logits[0].abs().max()
    again = quiet_train(replace(config, base=str(merged), out=str(tmp_path / "again"), adapter=AdapterConfig(r=2)))
    assert again.base_val_loss == pytest.approx(result.best_val_loss, rel=1e-5) != result.base_val_loss


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_loss_that_is_not_finite_names_the_parameter(method_config, tmp_path, precision):
    config = method_config("full", precision=precision)
    weights = {k: t.clone() for k, t in read_checkpoint(config.base).items()}
    weights["blocks.1.ffn.key.weight"][0, 0] = float("inf")
    broken = tmp_path / "broken.pth"
    write_pth(broken, {k: TensorSpec(t.shape, t.dtype) for k, t in weights.items()}, weights.__getitem__)
    with pytest.raises(RunError, match=r" is blocks\.1\.ffn\.key \(\w*Linear, its weight is not finite\)"):
        quiet_train(replace(config, base=str(broken)))


def test_full_training_in_bf16_begins_from_the_files_own_values(method_config):
    """Not from those that the forward pass in bf16 is given: an fp32 base would lose its low bits."""
    config = method_config("full", precision="bf16", max_steps=1, lr=1e-30, weight_decay=0.0)
    quiet_train(config)
    for key, tensor in read_checkpoint(config.base).items():
        assert torch.equal(adapter(config.out)[f"base_model.model.{key}"], tensor), key
