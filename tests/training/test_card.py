"""The cards of a real run and of its merge: their facts are the run's, and their commands run."""

from __future__ import annotations

import io
import json
import re
import shlex
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from rwkv_miss import load_adapter, load_model
from rwkv_miss.adapters.files import read_facts
from rwkv_miss.cli import main
from rwkv_miss.config import AdapterConfig, TrainConfig
from rwkv_miss.training.checks import as_yaml
from tests.training.runs import adapter, losses, quiet_train, small_config


def card_of(folder: Path) -> str:
    return (folder / "README.md").read_text(encoding="utf-8")


def front_of(text: str) -> dict:
    return yaml.safe_load(text.split("---\n")[1])


def facts_of(text: str) -> dict[str, str]:
    """Name -> value of all sections."""
    found = re.findall(r"^- (.*?): `(.*)`$", text, re.MULTILINE)
    return {name.replace("\\", ""): value for name, value in found}


def numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"[\d.]+", text)]


def commands_of(text: str) -> list[list[str]]:
    """Our commands in the card's blocks for a shell."""
    lines = [line for block in re.findall(r"```sh\n(.*?)\n```", text, re.DOTALL) for line in block.splitlines()]
    return [shlex.split(line)[1:] for line in lines if line.startswith("rwkv-miss ")]


@pytest.fixture(scope="module")
def run(base, data, tmp_path_factory) -> TrainConfig:
    config = small_config(base, data, tmp_path_factory.mktemp("run") / "run")
    config = replace(config, val_split=0.2, val_every=2, max_steps=4, template="g1")
    quiet_train(config)
    return config


@pytest.fixture
def own_run(run, tmp_path) -> TrainConfig:
    """The run, in a folder that the test may change."""
    return replace(run, out=str(shutil.copytree(run.out, tmp_path / "run")))


def test_the_card_of_a_run_has_its_facts(run, data):
    out = Path(run.out)
    text = card_of(out / "adapter")
    assert front_of(text) == {
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["rwkv", "rwkv-7", "miss"],
    }
    facts, record = facts_of(text), json.loads((out / "run.json").read_text())
    val, train = losses(out, "val_loss"), losses(out)
    best = min(range(1, len(val)), key=val.__getitem__)
    assert numbers(facts["validation loss"]) == pytest.approx([val[0], val[best]], abs=1e-4)
    assert numbers(facts["training loss"]) == pytest.approx([train[0], train[2 * best - 1]], abs=1e-4)
    assert facts["optimizer steps"] == f"{2 * best} of {record['total_steps']}"
    assert facts["file"] == "base.pth" and load_model(run.base).fingerprint.startswith(facts["fingerprint"])
    sizes, trained, validated = record["trained"]
    assert sizes.startswith(facts["model"]) and trained == f"training: {facts[str(data)]}"
    assert validated == f"validation: {facts['validation']}"
    settings, defaults = as_yaml(run), as_yaml(TrainConfig(base="", data="", tokenizer="", out=""))
    for name in ("lr", "max_steps", "val_split", "val_every", "grad_clip", "template", "tokenizer", "packing"):
        assert settings[name] != defaults[name] and facts[name] == str(settings[name])
    assert (facts["adapter.method"], facts["adapter.r"]) == ("miss", "4")
    assert not {"weight_decay", "seed", "overwrite", "out", "data"} & facts.keys()
    assert f"```sh\n{record['command']}\n```" in text
    assert "the base on the hub" in text.split("---\n")[1]


def test_the_commands_of_the_cards_run(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = card_of(Path(run.out) / "adapter")
    commands = commands_of(text)
    assert [command[0] for command in commands] == ["generate", "chat", "merge"]
    said = []
    for name, *options in commands:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Why is the sky blue?\n")))
        assert main([name, *options, *([] if name == "merge" else ["--max_tokens=5"])]) == 0
        said.append(capsys.readouterr().out)
    merged = (tmp_path / "merged.md").read_text()
    again = [command for command in commands_of(merged) if command[0] != "merge"]
    for name, *options in again:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Why is the sky blue?\n")))
        assert main([name, *options, "--max_tokens=5"]) == 0
        said.append(capsys.readouterr().out)
    assert [command[0] for command in again] == ["generate", "chat"] and all("--template" in c for c in again)
    assert said[0] == said[1] == said[3] == said[4] != "\n"
    facts = facts_of(text)
    assert facts.items() <= facts_of(merged).items() and facts_of(merged)["adapter"] == str(Path(run.out) / "adapter")
    [made] = [command for command in commands_of(merged) if command[0] == "merge"]
    assert made == commands[2]


def test_a_merge_takes_no_file_of_the_users(run, tmp_path, capsys):
    out, card = tmp_path / "m.pth", tmp_path / "m.md"
    argv = ["merge", f"--base={run.base}", f"--adapter={run.out}", f"--out={out}"]
    card.write_text("mine")
    assert main(argv) == 2
    assert "m.md: is there already, and a card would be written" in capsys.readouterr().err and not out.exists()
    assert main([*argv, "--card=false"]) == 0 and card.read_text() == "mine"
    assert main([*argv, "--overwrite=true"]) == 0 and "rwkv-7" in card.read_text()


def test_a_merge_of_two(run, tmp_path):
    argv = ["merge", f"--base={run.base}", f"--adapter=[{run.out},{run.out}]", "--weights=[0.5,0.25]"]
    assert main([*argv, f"--out={tmp_path / 'm.pth'}", "--dtype=bf16"]) == 0
    text = (tmp_path / "m.md").read_text()
    assert f"## Data of {run.out}" in text.replace("\\", "") and "2 adapters" in text
    [*_, made] = [command for command in commands_of(text) if command[0] == "merge"]
    assert main([*made, "--overwrite=true"]) == 0 and (tmp_path / "m.md").read_text() == text


def test_a_run_owns_its_adapters_folder(own_run):
    """What was written into its card is replaced when the run goes on, and a new run removes it."""
    run = own_run
    folder = Path(run.out) / "adapter"
    (folder / "README.md").write_text("mine")
    quiet_train(replace(run, max_steps=6, lr=1e-2, resume="auto"))
    assert facts_of(card_of(Path(run.out) / "adapter_last"))["optimizer steps"] == "6 of 6"
    (folder / "README.md").write_text("mine")
    (folder / "other.md").write_text("mine")
    quiet_train(replace(run, overwrite=True, max_steps=1, val_split=0.0, val_every=0))
    assert "1 of 1" in card_of(folder) and (folder / "other.md").read_text() == "mine"
    assert not (Path(run.out) / "adapter_last").exists()  # nothing of the old run is left there


@pytest.mark.parametrize(
    ("method", "library"),
    [(AdapterConfig("state"), None), (AdapterConfig("full"), None), (AdapterConfig("lora", r=4), "peft")],
)
def test_other_methods(make_config, method, library):
    config = make_config(adapter=method, max_steps=1)
    quiet_train(config)
    text = card_of(Path(config.out) / "adapter")
    assert front_of(text).get("library_name") == library and front_of(text)["tags"][-1] == method.method
    assert ("adapter.r" in facts_of(text)) == (method.method == "lora") and "validation loss" not in text


def test_facts_that_are_damaged(own_run, capsys):
    path = Path(own_run.out) / "adapter" / "rwkv_miss.json"
    for name, value in (("card", {"Data": 3}), ("card", []), ("command", 3), ("tokenizer", [])):
        before = path.read_text()
        path.write_text(json.dumps(json.loads(before) | {name: value}))
        assert main(["merge", f"--base={own_run.base}", f"--adapter={own_run.out}", f"--out={own_run.out}/m.pth"]) == 2
        assert f"rwkv_miss.json: {name} is" in capsys.readouterr().err
        path.write_text(before)


@pytest.mark.slow
def test_peft_loads_a_folder_with_a_card(run):
    peft = pytest.importorskip("peft")
    folder = Path(run.out) / "adapter"
    assert peft.PeftConfig.from_pretrained(folder).peft_type == "MISS" and "rwkv" in card_of(folder)
    assert len(peft.utils.load_peft_weights(folder, device="cpu")) == len(adapter(run.out))
    assert load_adapter(load_model(run.base), folder) and read_facts(folder)["card"]["Results"]
