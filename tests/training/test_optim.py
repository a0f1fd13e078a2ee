import pytest
import torch

from rwkv_miss import AdapterConfig, inject, load_model
from rwkv_miss.config import TrainConfig
from rwkv_miss.training.optim import configure, lr_columns, lr_scale, parameter_groups


def scales(total, **settings):
    config = TrainConfig(base="b", data="d", tokenizer="t", out="o", **settings)
    return [lr_scale(step, total, config) for step in range(total + 1)]


def test_warm_up_rises_linearly_from_above_zero_to_the_peak():
    assert scales(10, warmup_steps=4, schedule="constant") == [0.25, 0.5, 0.75, 1.0] + [1.0] * 7


def test_cosine_starts_at_the_peak_halves_in_the_middle_and_ends_at_lr_min():
    found = scales(10, schedule="cosine", lr_min=0.1)
    assert found[0] == 1.0
    assert found[5] == pytest.approx(0.55)
    assert found[10] == pytest.approx(0.1)
    assert found == sorted(found, reverse=True)


def test_cosine_after_a_warm_up_covers_the_rest():
    found = scales(12, warmup_steps=2, schedule="cosine")
    assert found[2] == 1.0 and found[7] == pytest.approx(0.5) and found[12] == pytest.approx(0)


def test_wsd_is_constant_until_its_share_of_the_end_and_then_falls_linearly():
    assert scales(10, schedule="wsd", decay_share=0.4) == pytest.approx([1] * 7 + [0.75, 0.5, 0.25, 0])


def test_wsd_that_decays_from_the_first_step_still_warms_up():
    assert scales(4, schedule="wsd", decay_share=1.0, warmup_steps=2) == pytest.approx([0.5, 1, 1, 0.5, 0])


def groups(model, **settings):
    """{(lr, weight decay): the keys of its parameters}"""
    config = TrainConfig(base="b", data="d", tokenizer="t", out="o", **settings)
    return {(g.lr, g.weight_decay): set(found) for g, found in parameter_groups(model, config).items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_full_has_blinkdls_groups(either_base, dtype):
    model = load_model(either_base, dtype)
    base, version = dict(model.named_parameters()), model.config.version
    found = groups(inject(model, AdapterConfig("full")), lr=1e-3, weight_decay=0.1)
    decay_bases = {f"blocks.{i}.att.{'w0' if version == 7 else 'time_decay'}" for i in range(3)}
    matrices = {name for name, p in base.items() if p.ndim == 2 and name.endswith(".weight")}
    assert len(matrices) == 2 + 3 * (6 if version == 7 else 8)
    assert found == {
        (1e-3, 0.1): matrices,
        (2e-3, 0.0): decay_bases,
        (1e-3, 0.0): set(base) - matrices - decay_bases,
    }
    found = groups(model, lr=1e-3)
    assert found == {(1e-3, 0.0): set(base) - decay_bases, (2e-3, 0.0): decay_bases}


def test_adapters_and_states_are_one_group_and_parts_of_the_base_follow_the_rule(either_base):
    found = groups(inject(load_model(either_base), AdapterConfig("miss+state", r=4)), lr=1e-3, weight_decay=0.1)
    assert list(found) == [(1e-3, 0.1)]
    states = {f"blocks.{i}.att.time_state" for i in range(3)}
    apart = groups(inject(load_model(either_base), AdapterConfig("miss+state", r=4)), lr=1e-3, lr_state=0.5)
    assert apart == {(1e-3, 0.0): found[1e-3, 0.1] - states, (0.5, 0.0): states}
    config = AdapterConfig("miss+state", r=4, modules_to_save=["ln", "head", "time"])
    more = groups(inject(load_model(either_base), config), lr=1e-3, weight_decay=0.1)
    assert more[1e-3, 0.1] == found[1e-3, 0.1] | {"head.weight"}
    assert len(more[2e-3, 0.0]) == 3 and "ln_out.weight" in more[1e-3, 0.0]


def test_the_schedule_keeps_the_ratio_of_the_groups(either_base):
    config = TrainConfig(base="b", data="d", tokenizer="t", out="o", lr=1e-3, warmup_steps=2, lr_min=0.5)
    model = inject(load_model(either_base), AdapterConfig("full"))
    optimizer, schedule = configure(parameter_groups(model, config), 4, config)
    for step in range(5):
        lrs = sorted({g["lr"] for g in optimizer.param_groups})
        assert lrs == pytest.approx([1e-3 * lr_scale(step, 4, config), 2e-3 * lr_scale(step, 4, config)])
        optimizer.step()
        schedule.step()


def test_each_learning_rate_has_a_column(either_base):
    def columns(adapter: AdapterConfig, **settings) -> list[str]:
        config = TrainConfig(base="b", data="d", tokenizer="t", out="o", **settings)
        return lr_columns(parameter_groups(inject(load_model(either_base), adapter), config))

    decay = "w0" if load_model(either_base).config.version == 7 else "time_decay"
    assert columns(AdapterConfig(r=4)) == ["lr"]
    assert set(columns(AdapterConfig("full"), weight_decay=0.1)) == {"lr", f"lr_{decay}"}
    assert set(columns(AdapterConfig("miss+state", r=4), lr_state=0.5)) == {"lr", "lr_state"}
    assert columns(AdapterConfig("miss+state", r=4)) == ["lr"]
    assert columns(AdapterConfig("state"), lr_state=0.5) == ["lr"]  # the only rate that there is
