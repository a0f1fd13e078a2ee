"""Model cards: whatever the names hold, Markdown shows them as they are, and the front matter is YAML."""

from __future__ import annotations

import os
import shlex
import sys

import pytest
import torch
import yaml
from markdown_it import MarkdownIt

from rwkv_miss.export.card import QUESTION, Use, adapter_uses, command, merged_uses, model_card
from tests.processes import run_process

NASTY = [
    "`",
    "``a`",
    " b ",
    "*c* _d_",
    "| e |",
    "<script>",
    "# f",
    "- g",
    "---",
    "{{ h }}",
    "[i](j)",
    "&amp;",
    "é日\\`",
    "~~~",
]
NASTY += ["a\nb", "```\n````\nc", "\x1b[31m", "$HOME `id`", "it's", "-->"]


def parsed(text: str):
    """The front matter, and the Markdown below it as markdown-it's tokens."""
    _, front, body = text.split("---\n", 2)
    return yaml.safe_load(front), MarkdownIt("commonmark").parse(body)


def spans(tokens) -> list[str]:
    return [child.content for token in tokens for child in token.children or [] if child.type == "code_inline"]


def one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\x1b", " ")


@pytest.mark.parametrize("name", NASTY)
def test_names_are_shown_as_they_are(name):
    uses = {"A way": ("sh", name)}
    text = model_card(name, "Said.", [name], {name: {name: name}}, [name], uses, version="1", library=name, end="End.")
    front, tokens = parsed(text)
    assert front == {"pipeline_tag": "text-generation", "tags": [name], "library_name": name}
    # markdown-it strips the ends of a code span that both begin and end with a space, as CommonMark says.
    assert spans(tokens) == [one_line(name).strip() if name == " b " else one_line(name)] * 2
    assert [token.content for token in tokens if token.type == "fence"] == [f"{name}\n"] * 2
    headings = [tokens[i + 1] for i, token in enumerate(tokens) if token.type == "heading_open"]
    kinds = {child.type for token in [*headings, *tokens] for child in token.children or []}
    assert kinds <= {"text", "code_inline", "softbreak", "text_special"}
    plain = "".join(child.content for child in headings[1].children or [])
    assert plain.strip() == one_line(name).strip()
    [html] = [token.content for token in tokens if token.type == "html_block"]
    assert html.strip() == "<!-- Written by rwkv-miss 1. End. -->"


def test_sections_without_facts_and_uses_are_left_out():
    text = model_card("a", "b", ["c"], {"Data": {}}, ["d"], {}, version="1")
    assert "Data" not in text and "How it is run" not in text and "library_name" not in text


def test_commands():
    world = Use(7, "world", "g1", "User: a\n\nAssistant:")
    uses = merged_uses("it's/m.pth", world)
    ours = '--model "it\'s/m.pth" --template g1 --tokenizer world'
    assert shlex.split(uses["A question"][1]) == shlex.split(f"rwkv-miss generate {ours} --prompt '{QUESTION}'")
    assert shlex.split(uses["A conversation"][1]) == shlex.split(f"rwkv-miss chat {ours}")
    assert 'V7_ON"] = "1"' in uses["The `rwkv` package"][1]
    assert '"RWKV_V7_ON"] = "0"' in merged_uses("m.pth", Use(6, "world", "g1", "User: a"))["The `rwkv` package"][1]
    export, run = uses["llama.cpp and what is built on it"][1].split("\n")
    assert shlex.split(export) == [
        "rwkv-miss",
        "export",
        "--model",
        "it's/m.pth",
        "--to",
        "gguf",
        "--out",
        "it's/m.gguf",
    ]
    assert shlex.split(run) == ["llama-cli", "-m", "it's/m.gguf"]
    assert "--template" not in str(adapter_uses("b.pth", "run/adapter", world))  # it is recorded with the adapter
    assert list(merged_uses("m.pth", Use(6, "bytes", "world", None))) == []
    assert list(adapter_uses("b.pth", "a", Use(6, "bytes", "world", None))) == ["As one file for other runtimes"]
    assert command("merge", base="a b") == "rwkv-miss merge --base 'a b'"


@pytest.mark.slow
def test_the_code_for_the_rwkv_package_runs(random_weights, tmp_path):
    pytest.importorskip("rwkv")
    torch.save(random_weights(vocab_size=65536, n_layer=1), tmp_path / "it's.pth")
    uses = merged_uses(str(tmp_path / "it's.pth"), Use(7, "world", "world", "User: a\n\nAssistant:"))
    code = uses["The `rwkv` package"][1].replace("token_count=200", "token_count=2")
    done = run_process([sys.executable, "-c", code], 300, env=os.environ | {"RWKV_JIT_ON": "0"})  # it compiles for long
    assert done.returncode == 0, done.stderr
