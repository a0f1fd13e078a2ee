"""docs/templates.md is true: its records become the texts that it shows, its template is one, its commands are read."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest

from rwkv_miss import cli
from rwkv_miss.config import DataOptions
from rwkv_miss.data.readers.fields import KNOWN_PAIRS, ROLES, record_of
from rwkv_miss.data.rendering import render
from rwkv_miss.data.templates import TEMPLATES, Template, find_template

PAGE = (Path(__file__).parents[2] / "docs" / "templates.md").read_text()
EXAMPLES = re.findall(r"```json\n(.*?)\n```\n\n`--template ([\w-]+)`:\n\n(`{3,})text\n(.*?)\n\3\n", PAGE, re.DOTALL)


def test_it_names_everything():
    assert {f"`{name}`" for name in TEMPLATES} <= set(re.findall(r"`[\w-]+`", PAGE))
    named = {name for pair in KNOWN_PAIRS for name in pair} | {"developer", "human", "gpt", "observation"}
    assert {f"{f.name}" for f in fields(Template)} | named <= set(re.findall(r"\w+", PAGE))
    assert set(ROLES) <= set(re.findall(r"\w+", PAGE))
    assert {name for _, name, _, _ in EXAMPLES} == {"world", "g1", "g1-think", "instruction", "fim", "none"}


@pytest.mark.parametrize(("record", "name", "_", "text"), EXAMPLES)
def test_an_example_is_what_it_shows(record, name, _, text):
    options = DataOptions(template=name)
    found = record_of("page", json.loads(record), options)
    assert not found.unread
    assert "".join(f"⟦{span.text}⟧" if span.learned else span.text for span in render(found, options)) == text


def test_the_template_of_ones_own_is_one(tmp_path):
    [content] = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    path = tmp_path / "own.yaml"
    path.write_text(content)
    assert find_template(str(path)).stops == ("<|im_end|>",)


@pytest.mark.parametrize("command", re.findall(r"^rwkv-miss .*$", PAGE, re.MULTILINE))
def test_a_command_is_accepted_as_written(command):
    cli._parse(shlex.split(command)[1:])
