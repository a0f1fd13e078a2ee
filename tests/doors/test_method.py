"""A method is one file and one line of a table: the toy trains, saves, loads, resumes and merges."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import rwkv_miss
from rwkv_miss import AdapterConfig, inject, load_adapter, load_model, merge
from rwkv_miss.adapters.inject import installed, trained_parameters
from rwkv_miss.adapters.method import METHODS
from rwkv_miss.describe import describe
from rwkv_miss.errors import UserError
from tests.doors.toy_method import ENTRY
from tests.training.runs import adapter, losses, quiet_train, small_config

TOKENS = torch.randint(64, (2, 13), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    monkeypatch.setitem(METHODS, "toy", ENTRY)


@pytest.fixture
def config(base, data, tmp_path):
    method = AdapterConfig("toy", options={"gain": 2.0}, target_modules=["att.key", "ffn.value"])
    return replace(small_config(base, data, tmp_path / "run"), adapter=method, max_steps=4, schedule="constant")


@torch.no_grad()
def test_a_new_one_computes_the_base(either_base):
    expected = load_model(either_base)(TOKENS)[0]
    assert torch.equal(inject(load_model(either_base), AdapterConfig("toy"))(TOKENS)[0], expected)


def test_it_trains_resumes_and_merges(config, tmp_path):
    quiet_train(config)
    found = losses(config.out)
    assert found[-1] < found[0]
    assert losses(config.out, "lr") == [3 * config.lr] * 4
    saved = adapter(config.out)
    assert {tuple(t.shape) for t in saved.values()} == {(32,)} and len(saved) == 4

    first = replace(config, out=str(tmp_path / "parts"), max_steps=2)
    quiet_train(first)
    quiet_train(replace(first, max_steps=4, resume="auto"))
    assert losses(first.out) == found
    assert all(torch.equal(t, adapter(first.out)[key]) for key, t in saved.items())

    folder, merged = Path(config.out) / "adapter", tmp_path / "merged.pth"
    report = merge(config.base, folder, merged)
    assert len(report.layers) == 4 and report.logits_error < 1e-5 < report.logits_effect
    model = load_adapter(load_model(config.base), folder)
    with torch.no_grad():
        torch.testing.assert_close(load_model(merged)(TOKENS)[0], model(TOKENS)[0], rtol=0, atol=1e-5)
    assert installed(model).config.options == {"gain": 2.0}
    assert list(trained_parameters(model)) == [key.removeprefix("base_model.model.") for key in sorted(saved)]
    assert describe(folder)["adapter"] == "toy" and describe(folder)["linears"] == "4"


def test_beside_a_state_and_whole_modules(config, tmp_path):
    several = AdapterConfig("toy+state", target_modules=["att.key"], modules_to_save=["ln"])
    config = replace(config, adapter=several, lr_state=0.1, packing=True)
    quiet_train(config)
    merge(config.base, config.out, tmp_path / "merged.pth")
    assert set(losses(config.out, "lr_state")) == {0.1} and set(losses(config.out, "lr_toy")) == {3 * config.lr}


def test_files(config, tmp_path):
    quiet_train(replace(config, max_steps=1))
    folder = Path(config.out) / "adapter"
    written = json.loads((folder / "adapter_config.json").read_text())
    assert written["peft_type"] == "TOY" and written["toy_gain"] == 2.0
    assert all(key.endswith(".toy_scale") for key in load_file(folder / "adapter_model.safetensors"))
    (folder / "adapter_config.json").write_text(json.dumps(written | {"toy_gain": "much"}))
    with pytest.raises(UserError, match=r"adapter_config\.json: toy_gain is 'much'; expected a number"):
        load_adapter(load_model(config.base), folder)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (AdapterConfig("toy", options={"gian": 1.0}), "adapter.options has 'gian', .*; it has gain"),
        (AdapterConfig("toy", options={"gain": "2"}), "adapter.options.gain is '2'; expected float"),
        (AdapterConfig("miss", r=4, options={"gain": 1.0}), "no option of method miss; it has none"),
        (AdapterConfig("toy", dropout=0.1), "adapter.dropout is given, but adapter.method toy has no use for it"),
        (AdapterConfig("toy+miss", r=4), "only one of its methods can go beside linears"),
        (AdapterConfig("toy+full"), "would train blocks.0.att.receptance.weight in two ways"),
        (AdapterConfig("toy+toy"), "name each method once"),
    ],
)
def test_settings_that_it_cannot_have(make_base, config, said):
    with pytest.raises(UserError, match=said):
        inject(load_model(make_base()), config)


def test_no_methods_name_is_outside_its_file_and_the_table():
    """But for words that name much else too, the default in the settings with its help, benchmarks of one, and file
    formats."""
    package = Path(rwkv_miss.__file__).parent
    names = METHODS.keys() - {"toy", "state", "full"}
    for path in package.rglob("*.py"):
        found = names & set(re.findall(r"(?<![\w.-])[a-z_]+(?![\w-])", path.read_text()))
        where = path.relative_to(package).with_suffix("").as_posix()
        own = {name for name, entry in METHODS.items() if entry.module.endswith(where.replace("/", "."))}
        is_called_so = where in ("adapters/method", "config") or "bench" in where or where.startswith("export/")
        assert found <= own or is_called_so, (where, found)
