"""The cards of exports: what they say, where they are, and what they do not replace."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import torch
import yaml
from markdown_it import MarkdownIt

from rwkv_miss import AdapterConfig, inject, load_model, save_adapter
from rwkv_miss.adapters.inject import trained_parameters
from rwkv_miss.cli import main

FACTS = {"tokenizer": "bytes", "command": "rwkv-miss train ...", "card": {"Settings": {"lr": "0.001"}}}


@pytest.fixture
def given(make_base, tmp_path, monkeypatch) -> list[str]:
    """The options of a base and its adapter, in the current folder."""
    monkeypatch.chdir(tmp_path)
    path = make_base(n_embd=64, head_size=64, vocab_size=256)
    model = inject(load_model(path), AdapterConfig(r=4))
    for parameter in trained_parameters(model).values():
        parameter.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
    save_adapter(model, "its adapter", FACTS)
    return ["--model", str(path), "--adapter", "its adapter"]


def ordered(arguments: list[str]) -> list[str]:
    """The arguments in the order in which the card has them."""
    command, *rest = arguments
    options = dict(zip(rest[::2], rest[1::2], strict=True))
    names = ("--model", "--to", "--out", "--adapter")
    return [command, *(part for name in names for part in (name, options[name]))]


@pytest.mark.parametrize(
    "to, out, card, use",
    [
        ("st", "my model.st", "my model.st.md", 'name = "my model.st"'),
        ("st-lora", "lora.st", "lora.st.md", "alpha = 1.0"),
        ("rwkv.cpp", "my model.bin", "my model.bin.md", "generate_completions.py 'my model.bin'"),
        pytest.param("gguf", "a.gguf", "a.gguf.md", "llama-server -m a.gguf", marks=pytest.mark.slow),
        pytest.param("gguf-lora", "a.gguf", "a.gguf.md", "-m base.gguf --lora a.gguf", marks=pytest.mark.slow),
        pytest.param("hf", "my hf", "my hf/README.md", 'from_pretrained("my hf")', marks=pytest.mark.slow),
        pytest.param("peft-lora", "lora", "lora/README.md", '"base-hf"), "lora")', marks=pytest.mark.slow),
    ],
)
def test_a_card_is_written(given, capsys, to, out, card, use):
    arguments = ["export", *given, "--to", to, "--out", out]
    assert main(arguments) == 0
    _, front, body = Path(card).read_text().split("---\n", 2)
    assert yaml.safe_load(front)["tags"] == ["rwkv", "rwkv-7", "miss"]
    blocks = [token.content for token in MarkdownIt("commonmark").parse(body) if token.type == "fence"]
    [trained, written] = blocks[0].splitlines()
    assert trained == FACTS["command"] and shlex.split(written) == ["rwkv-miss", *ordered(arguments)]
    assert use in blocks[1]
    said = capsys.readouterr().out.splitlines()[0]
    assert said in body and "- lr: `0.001`" in body and f"- format: `{to}`" in body


def test_what_is_there_is_left(given, capsys):
    Path("a.st.md").write_text("mine")
    assert main(["export", *given, "--to", "st", "--out", "a.st"]) == 2
    assert "a.st.md: is there already" in capsys.readouterr().err
    assert Path("a.st.md").read_text() == "mine" and not Path("a.st").exists()
    assert main(["export", *given, "--to", "st", "--out", "a.st", "--card", "false"]) == 0
    assert Path("a.st.md").read_text() == "mine" and Path("a.st").exists()
