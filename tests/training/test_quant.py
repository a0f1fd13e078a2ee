"""Training on a base whose linears are stored in 8 or 4 bits."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rwkv_miss import load_model, merge
from rwkv_miss.adapters.files import read_facts
from rwkv_miss.adapters.method import METHODS
from rwkv_miss.checkpoint import read_checkpoint
from rwkv_miss.cli import main
from rwkv_miss.config import AdapterConfig, TrainConfig
from rwkv_miss.errors import UserError
from rwkv_miss.model import quantised
from rwkv_miss.training import run
from tests.training.runs import adapter, losses, quiet_train, run_train, small_config

TRAINED = [name for name in METHODS if name != "full"]


def quantised_config(base: Path, data: Path, out: Path, method: str = "miss", **changes) -> TrainConfig:
    """4 steps in bf16 on a base in NF4."""
    lr = 0.3 if method == "state" else 1e-2
    settings = dict(adapter=AdapterConfig(method, r=4), quant="nf4", precision="bf16", lr=lr, max_steps=4)
    return replace(small_config(base, data, out), schedule="constant", **settings | changes)


@pytest.mark.slow
@pytest.mark.parametrize("method", TRAINED)
def test_methods_train_resume_and_merge(any_base, data, tmp_path, method):
    straight = quantised_config(any_base, data, tmp_path / "straight", method)
    quiet_train(straight)
    found = losses(straight.out)
    assert found[-1] < 0.99 * found[0]
    first = replace(straight, out=str(tmp_path / "parts"), max_steps=2)
    quiet_train(first)
    with pytest.raises(UserError, match="quant was nf4, is int8"):
        quiet_train(replace(first, max_steps=4, resume="auto", quant="int8"))
    quiet_train(replace(first, max_steps=4, resume="auto"))
    assert losses(first.out) == found
    assert all(torch.equal(t, adapter(straight.out)[n]) for n, t in adapter(first.out).items())

    folder, merged = Path(straight.out) / "adapter", tmp_path / "merged.pth"
    assert read_facts(folder)["quant"] == "nf4"
    changed = {layer.name for layer in merge(any_base, folder, merged).layers}
    base, written = read_checkpoint(any_base), read_checkpoint(merged)
    same = [key for key in base if not {key, key.removesuffix(".weight")} & changed]
    assert same and all(torch.equal(written[key], base[key]) for key in same)  # what was not trained is as in the file


@pytest.mark.slow
@pytest.mark.parametrize("method", TRAINED)
def test_methods_train_resume_and_merge_under_zero_2(any_base, data, tmp_path, method, capsys):
    one = quantised_config(any_base, data, tmp_path / "one", method, max_steps=3, precision="fp32")
    quiet_train(one)
    zero = replace(one, out=str(tmp_path / "zero"), strategy="deepspeed_stage_2", offload="optimizer")
    for config in (replace(zero, max_steps=2), replace(zero, resume="auto")):
        done = run_train(config)
        assert done.returncode == 0, done.stderr
    assert losses(zero.out) == pytest.approx(losses(one.out), rel=2e-5)
    assert main(["merge", f"--base={any_base}", f"--adapter={zero.out}", f"--out={tmp_path}/merged.pth"]) == 0
    assert "an adapter was trained on the base in nf4" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "quant"), [("ddp", "nf4"), ("deepspeed_stage_3", "int8")])
def test_two_processes_give_the_run_of_one(base, data, tmp_path, strategy, quant):
    one = quantised_config(base, data, tmp_path / "one", precision="fp32", quant=quant)
    quiet_train(one)
    two = replace(one, out=str(tmp_path / "two"), strategy=strategy, devices=2, batch_size=4)
    done = run_train(two)
    assert done.returncode == 0, done.stderr
    assert f"37,664 parameters frozen in float32, {quant}" in done.stdout
    assert losses(two.out) == pytest.approx(losses(one.out), rel=2e-5)
    for name, tensor in adapter(two.out).items():
        torch.testing.assert_close(tensor, adapter(one.out)[name], rtol=2e-3, atol=5e-5)


def test_eval_computes_what_the_run_did(any_base, data, tmp_path, capsys):
    config = quantised_config(any_base, data, tmp_path, val_data=str(data), precision="fp32", ctx_len=192)
    best = quiet_train(config).best_val_loss
    found = {}
    for quant in ("none", "nf4"):
        options = [f"--model={any_base}", f"--adapter={config.out}", f"--data={data}", "--tokenizer=bytes"]
        assert main(["eval", *options, f"--quant={quant}", "--ctx_len=192", "--json"]) == 0
        found[quant] = json.loads(capsys.readouterr().out)["loss"]
    assert found["nf4"] == pytest.approx(best, rel=1e-5) != pytest.approx(found["none"], rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"quant": "int4"}, "quant is 'int4'; it must be one of none, int8, nf4"),
        ({"quant": "none", "quant_skip": ["att.key"]}, "quant_skip is given without quant"),
        ({"quant_skip": ["att.gate"]}, r"quant_skip: att\.gate is no linear that is quantised; there are: att\.recept"),
        ({"adapter": AdapterConfig("full")}, r"blocks\.0\.att\.receptance\.weight would be trained, but it is quant"),
        ({"adapter": AdapterConfig("state", modules_to_save=["ffn.value"])}, r"blocks\.0\.ffn\.value\.weight would be"),
        ({"strategy": "deepspeed_stage_3", "offload": "all"}, "offload is all, but weights in nf4 stay on the GPU"),
    ],
)
def test_what_does_not_combine_is_said_before_the_base_is_loaded(make_config, monkeypatch, changes, said):
    monkeypatch.setattr(run, "build_model", None)
    with pytest.raises(UserError, match=said):
        quiet_train(make_config(**{"quant": "nf4"} | changes))


def test_without_bitsandbytes(make_config, monkeypatch):
    monkeypatch.setattr(run, "build_model", None)
    monkeypatch.setattr(quantised, "_bitsandbytes", lambda: (_ for _ in ()).throw(OSError("no library\nfor this GPU")))
    with pytest.raises(UserError, match=r"quant nf4 cannot be used on cpu: OSError: no library$"):
        quiet_train(make_config(quant="nf4"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"bitsandbytes is not installed: pip install 'rwkv-miss\[quant\]'"):
        quiet_train(make_config(quant="nf4"))


def test_a_part_that_is_left_out_can_be_trained(make_config):
    config = make_config(quant="int8", quant_skip=["ffn.key"], max_steps=1)
    quiet_train(replace(config, adapter=AdapterConfig("state", modules_to_save=["ffn.key"])))
    base = load_model(config.base)
    for name, tensor in adapter(config.out).items():
        if name.endswith("ffn.key.weight"):
            before = base.get_parameter(name.removeprefix("base_model.model."))
            assert (
                not torch.equal(tensor, before) and (tensor - before).abs().max() < 0.02
            )  # from the file's own values
