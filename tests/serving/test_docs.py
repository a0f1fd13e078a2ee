"""docs/serving.md is true: its commands are accepted, its requests answered."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest

from rwkv_miss import cli
from rwkv_miss.config import ServeConfig
from tests.serving.kit import load, make_adapter, serving
from tests.test_readme import commands

DOCS = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()


@pytest.mark.parametrize("command", [command for command in commands(DOCS) if command.startswith("rwkv-miss")])
def test_a_command_is_accepted_as_written(command):
    cli._parse(shlex.split(command)[1:])


def test_the_limits_are_those_of_the_options():
    defaults = {f.name: f.default for f in fields(ServeConfig)}
    told = re.findall(r"^\| `--(\w+) (\d+)` \|", DOCS, re.MULTILINE)
    assert len(told) == 6 and all(defaults[name] == int(value) for name, value in told)


def test_the_requests_are_answered(base, tmp_path, monkeypatch, capsys):
    for i, name in enumerate(("mine", "third")):
        make_adapter(base, tmp_path / "out" / name, i)
    monkeypatch.chdir(tmp_path)
    with serving(load(base), adapter=["mine=out/mine"], allow_adapter_changes=True) as server:
        asked = [command for command in commands(DOCS) if command.startswith("curl")]
        assert len(asked) == 3
        for command in asked:
            _, url, *_, body = shlex.split(command)
            assert server.http.post(url.removeprefix("http://127.0.0.1:8000"), json=json.loads(body)).status_code == 200
        [code] = re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL)
        exec(code.replace("http://127.0.0.1:8000", server.url), {})
    assert "CompletionUsage(completion_tokens=20" in capsys.readouterr().out
