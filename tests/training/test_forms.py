"""Each form of MiSS trains, resumes and merges, in one process and under ZeRO-2; a folder of PEFT's trains on."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rwkv_miss import AdapterConfig, load_adapter, load_model, merge
from rwkv_miss.config import PlanConfig
from rwkv_miss.errors import UserError
from rwkv_miss.planning.report import plan
from tests.training.runs import adapter, losses, quiet_train, resumes_to_the_same_run, run_train, small_config

FORMS = {
    "miss": AdapterConfig(r=7, dropout=0.1),
    "mini": AdapterConfig("mini", r=8, options={"mini_r": 4}),
    "bat": AdapterConfig("bat", r=8),
}
# One column would add the same to all outputs of a linear, which the next layer norm takes away: no gradient is left.
EACH = AdapterConfig(
    r=8,
    method_pattern={"ffn[.].*": "mini", "att[.]key": "bat"},
    rank_pattern={"att.key": 4},
    options={"mini_r": 4},
)
TOKENS = torch.randint(256, (2, 13), generator=torch.Generator().manual_seed(0))


def run_config(base, data, out, form, **changes):
    settings = dict(adapter=form, max_steps=4, lr=5e-3, schedule="constant", packing=True, batch_size=4)
    return replace(small_config(base, data, out), **settings | changes)


def merged_computes_the_same(base, out, tmp_path):
    report = merge(base, out, tmp_path / "merged.pth")
    assert report.logits_error < 1e-5 < report.logits_effect
    with torch.no_grad():
        adapted = load_adapter(load_model(base), out).eval()(TOKENS)[0]
        torch.testing.assert_close(load_model(tmp_path / "merged.pth")(TOKENS)[0], adapted, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_training_and_resuming_and_merging(any_base, data, tmp_path, form):
    config = run_config(any_base, data, tmp_path / "run", FORMS[form])
    quiet_train(config)
    assert losses(config.out)[-1] < losses(config.out)[0]
    resumes_to_the_same_run(config, tmp_path / "parts")
    merged_computes_the_same(any_base, config.out, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("any_base", [6, 7], indirect=True, ids=["RWKV-6", "RWKV-7"])
def test_zero_2_gives_the_run_of_one_process(any_base, data, tmp_path):
    """Two ranks, stopped and resumed, with each form beside some of the linears."""
    one = run_config(any_base, data, tmp_path / "one", EACH)
    quiet_train(one)
    two = replace(one, out=str(tmp_path / "two"), strategy="deepspeed_stage_2", devices=2, batch_size=2)
    for config in (replace(two, max_steps=2), replace(two, resume="auto")):
        done = run_train(config)
        assert done.returncode == 0, done.stderr
    assert losses(two.out) == pytest.approx(losses(one.out), rel=1e-5)
    for name, tensor in adapter(two.out).items():
        torch.testing.assert_close(tensor, adapter(one.out)[name], rtol=2e-3, atol=5e-5)
    merged_computes_the_same(any_base, two.out, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("form", [{}, {"init_weights": "mini", "mini_r": 4}, {"init_weights": "bat"}])
def test_a_folder_of_pefts_trains_on_and_resumes_and_merges(base, data, tmp_path, form):
    peft = pytest.importorskip("peft")
    options = dict(r=8, target_modules=["key"], exclude_modules=["blocks.1.att.key"], modules_to_save=["ln_out"])
    theirs = peft.get_peft_model(load_model(base), peft.MissConfig(**options, **form))
    rng = torch.Generator().manual_seed(5)
    for p in theirs.parameters():
        if p.requires_grad:
            p.data += 0.02 * torch.randn(p.shape, generator=rng)
    theirs.save_pretrained(tmp_path / "theirs")
    config = run_config(base, data, tmp_path / "run", AdapterConfig(), adapter_from=str(tmp_path / "theirs"))
    quiet_train(replace(config, max_steps=2))
    quiet_train(replace(config, resume="auto"))
    straight = replace(config, out=str(tmp_path / "straight"))
    quiet_train(straight)
    assert losses(config.out) == losses(straight.out) and losses(config.out)[-1] < losses(config.out)[0]
    assert adapter(config.out).keys() == peft.get_peft_model_state_dict(theirs).keys()
    merged_computes_the_same(base, config.out, tmp_path)
    opened = peft.PeftModel.from_pretrained(load_model(base), tmp_path / "run/adapter").eval()
    with torch.no_grad():
        adapted = load_adapter(load_model(base), config.out).eval()(TOKENS)[0]
        torch.testing.assert_close(opened(TOKENS)[0], adapted, rtol=0, atol=2e-5)
    planned = plan(PlanConfig(base=str(base), adapter_from=config.adapter_from))
    assert planned.trained == sum(tensor.numel() for tensor in adapter(config.out).values())
    # A run that hardly moves ends where the folder is.
    quiet_train(replace(straight, lr=1e-9, max_steps=1, overwrite=True))
    for key, tensor in peft.get_peft_model_state_dict(theirs).items():
        torch.testing.assert_close(adapter(straight.out)[key], tensor, rtol=0, atol=1e-7)
    with pytest.raises(UserError, match="adapter_from is given, whose folder has its own settings"):
        quiet_train(replace(straight, adapter=AdapterConfig(r=8), overwrite=True))
    with pytest.raises(UserError, match="lr_state is given, but"):
        quiet_train(replace(straight, lr_state=1.0, overwrite=True))
    with pytest.raises(UserError, match="adapter_from was"):
        quiet_train(replace(config, adapter_from=None, max_steps=5, resume="auto"))
