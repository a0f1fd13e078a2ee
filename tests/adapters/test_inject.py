from __future__ import annotations

import pytest
import torch

from rwkv_miss import AdapterConfig, inject, load_model
from rwkv_miss.errors import UserError
from tests.helpers import adapters

LINEARS = ["att.receptance", "att.key", "att.value", "att.output", "ffn.key", "ffn.value"]


@pytest.fixture
def model(make_base):
    return load_model(make_base())


def test_every_time_mix_and_channel_mix_linear_by_default(model):
    assert inject(model, AdapterConfig(r=4)) is model
    assert sorted(adapters(model)) == sorted(f"blocks.{i}.{name}" for i in range(3) for name in LINEARS)
    for name, layer in adapters(model).items():
        assert layer.miss_block.shape == (4, 128 if name.endswith("ffn.key") else 32)


def test_the_adapters_alone_are_trained(model):
    inject(model, AdapterConfig(r=4))
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"{name}.miss_block" for name in adapters(model)}
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(torch.randint(64, (2, 9)))[0].square().mean().backward()
    optimizer.step()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == trained


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["att.key"], {f"blocks.{i}.att.key" for i in range(3)}),
        (["key"], {f"blocks.{i}.{part}.key" for i in range(3) for part in ("att", "ffn")}),
        (["blocks.1.ffn.value", "att.output"], {"blocks.1.ffn.value", *(f"blocks.{i}.att.output" for i in range(3))}),
    ],
)
def test_target_modules(model, targets, expected):
    inject(model, AdapterConfig(r=4, target_modules=targets))
    assert set(adapters(model)) == expected


# A part of a name, a parameter that is no linear, the head, a layer that does not exist, a linear of RWKV-6 alone.
@pytest.mark.parametrize("target", ["ey", "att.w1", "head", "blocks.3.att.key", "att.gate"])
def test_a_target_that_matches_nothing(model, target):
    with pytest.raises(UserError, match=rf"target_modules: {target} matches no linear.*att\.key"):
        inject(model, AdapterConfig(r=4, target_modules=["att.key", target]))
    assert not adapters(model)


@pytest.mark.parametrize(
    ("target", "hint"),
    [
        ("all-linear", "give all-linear by itself, not in a list"),
        ("head", r"give modules_to_save \[head\]"),
        ("emb", r"give modules_to_save \[emb\]"),
    ],
)
def test_targets_of_other_programs(model, target, hint):
    with pytest.raises(UserError, match=hint):
        inject(model, AdapterConfig(r=4, target_modules=[target]))


def test_r_larger_than_the_input_names_the_layer(model):
    with pytest.raises(UserError, match=r"blocks\.0\.att\.receptance: r is 33 .* 32 inputs"):
        inject(model, AdapterConfig(r=33))
    assert not adapters(model) and all(p.requires_grad for p in model.parameters())
    inject(model, AdapterConfig(r=33, target_modules=["ffn.value"]))  # 128 inputs
    assert len(adapters(model)) == 3


def test_a_second_adapter_is_refused(model):
    inject(model, AdapterConfig(r=4, target_modules=["att.key"]))
    with pytest.raises(UserError, match="adapter already"):
        inject(model, AdapterConfig(r=4, target_modules=["att.value"]))
    assert len(adapters(model)) == 3


def test_every_wrong_setting_is_said_at_once(model):
    config = AdapterConfig(method="bone", r=0, dropout=1.0, target_modules=[])
    with pytest.raises(UserError) as error:
        inject(model, config)
    for word in ("adapter.method is 'bone'", "adapter.r is 0", "adapter.dropout is 1.0", "target_modules is empty"):
        assert word in str(error.value)
