"""docs/evaluating.md is true: its files are written, its commands run, and they say what it says, but for the numbers,
which differ a little between machines."""

from __future__ import annotations

import functools
import re
import shlex
from pathlib import Path

import pytest

from rwkv_miss import cli
from tests.helpers import walk_page

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "evaluating.md").read_text()


@pytest.mark.slow
def test_every_command_says_what_the_page_says(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    monkeypatch.setattr(cli, "_parser", functools.cache(cli._parser))

    def run(command: str) -> str:
        capsys.readouterr()
        assert cli.main(shlex.split(command)[1:]) == 0
        return capsys.readouterr().out

    outputs = walk_page(PAGE, run, lambda text: re.sub(r"\d[\d.,]*", "0", text))
    assert outputs == PAGE.count("rwkv-miss eval --model") - 1  # the last one writes a file
    assert len(Path("a.jsonl").read_text().splitlines()) == 3
