"""A template is one entry of a table, or a file of the same fields: a run is trained with it and every command uses it
without being told again."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from rwkv_miss.cli import main
from rwkv_miss.config import AdapterConfig
from rwkv_miss.data.templates import TEMPLATES, find_template
from rwkv_miss.generation.sampling import Sampling
from rwkv_miss.training import samples
from rwkv_miss.training.figures import read_samples
from tests.doors.toy_template import TEMPLATE
from tests.scripted import Scripted
from tests.training.runs import quiet_train, small_config


@pytest.fixture(params=["entry", "file"])
def run(request, monkeypatch, base, data, tmp_path):
    """The folder of a run with the toy, which is in the table or in a file that is there no longer."""
    if request.param == "entry":
        monkeypatch.setitem(TEMPLATES, "toy", TEMPLATE)
    path = tmp_path / "toy.yaml"
    path.write_text(json.dumps(asdict(TEMPLATE)))
    template = "toy" if request.param == "entry" else str(path)
    config = replace(small_config(base, data, tmp_path / "run"), max_steps=1, sample_every=1, sample_tokens=4)
    stops = []
    monkeypatch.setattr(samples, "Sampling", lambda **given: stops.append(given["stop"]) or Sampling(**given))
    quiet_train(replace(config, template=template))
    assert set(stops) == {TEMPLATE.stops}
    path.unlink()
    return tmp_path / "run"


def test_every_command_uses_the_template_of_the_run(run, base, data, tmp_path, capsys, caplog, monkeypatch):
    facts = json.loads((run / "adapter" / "rwkv_miss.json").read_text())
    assert find_template(facts["template"]) == TEMPLATE
    assert {row["prompt"][:9] for row in read_samples(run / "samples.jsonl")} == {"Q: count "}

    argv = ["merge", f"--base={base}", f"--adapter={run}", f"--out={tmp_path / 'merged.pth'}"]
    assert main(argv) == 0
    assert "the adapter was trained with the template toy: give --template where" in capsys.readouterr().out

    argv = ["eval", f"--model={base}", f"--adapter={run}", "--tokenizer=bytes", f"--data={data}", "--limit=1"]
    assert main([*argv, "--exact_match", "--max_tokens=1"]) == 0
    assert capsys.readouterr().out.startswith("Q: count 1\nA: ")

    asked = []
    said = Scripted(b" 4\nQ: more", b" 4\nQ: more")
    read = said.hidden

    def hidden(tokens, *rest, **named):
        asked.append(bytes(tokens.flatten().tolist()))
        return read(tokens, *rest, **named)

    said.hidden = hidden
    monkeypatch.setattr("rwkv_miss.commands.model.load", lambda *_: said)
    argv = ["generate", f"--model={base}", "--tokenizer=bytes", "--prompt=2+2", "--temperature=0", "--max_tokens=9"]
    assert main([*argv, f"--adapter={run}"]) == 0
    assert (asked[0], capsys.readouterr().out) == (b"Q: 2+2\nA:", "4\n") and not caplog.messages
    asked.clear()
    assert main([*argv, f"--adapter={run}", "--template=world"]) == 0
    assert (asked[0], capsys.readouterr().out) == (b"User: 2+2\n\nAssistant:", "4\nQ: mor\n")
    [warning] = caplog.messages
    assert warning.startswith("template is world, but the adapter was trained with ")


def test_a_thinking_model_is_asked_to_think(base, capsys, monkeypatch):
    monkeypatch.setattr("rwkv_miss.commands.model.load", lambda *_: Scripted(b">\nhm\n</think>\n4\0"))
    argv = ["generate", f"--model={base}", "--tokenizer=bytes", "--prompt=2+2", "--temperature=0"]
    assert main([*argv, "--template=g1-think"]) == 0
    assert capsys.readouterr().out == "<think>\nhm\n</think>\n4\n"


def test_training_goes_on_with_the_template_of_an_adapter(run, base, data, tmp_path):
    config = replace(small_config(base, data, tmp_path / "more"), max_steps=1, adapter_from=str(run))
    config = replace(config, adapter=AdapterConfig())
    quiet_train(config)
    facts = [json.loads((Path(out) / "adapter" / "rwkv_miss.json").read_text()) for out in (run, config.out)]
    assert facts[0]["template"] == facts[1]["template"]


def test_a_template_that_is_not_there_is_told_before_the_run(base, data, tmp_path, capsys):
    argv = ["train", f"--base={base}", f"--data={data}", "--tokenizer=bytes", f"--out={tmp_path / 'run'}"]
    assert main([*argv, "--template=g2"]) == 2
    assert "there is no template 'g2'; there are world, g1, " in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
