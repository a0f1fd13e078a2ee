import pytest

from rwkv_miss.config import TrainConfig
from rwkv_miss.training.optim import lr_scale


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
