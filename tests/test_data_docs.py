"""docs/data.md is true: its files are written, its commands run, and they say what it says."""

from __future__ import annotations

import functools
import logging
import shlex
import subprocess
import sys
from pathlib import Path

from rwkv_miss import cli
from rwkv_miss.config import DataOptions
from rwkv_miss.data.sources import parse_sources
from tests.helpers import walk_page

PAGE = (Path(__file__).parents[1] / "docs" / "data.md").read_text()


def run(command: str, caplog, capsys) -> str:
    """What a command prints, without what it always says of prompts. Of training, for which there is no base, only the
    command line and the sources are looked at."""
    name, *arguments = shlex.split(command)
    if name != "rwkv-miss":
        subprocess.run(command.replace("python ", f"{sys.executable} ", 1), shell=True, check=True)
        return ""
    if arguments[0] == "train":
        options, _ = cli._parse(arguments)
        for data in filter(None, (options.data, options.val_data)):
            assert parse_sources(data, DataOptions())
        return ""
    caplog.clear()
    capsys.readouterr()
    cli.main(arguments)
    out, err = capsys.readouterr()
    lines = [*caplog.messages, *err.splitlines(), *out.splitlines()]
    return "".join(f"{line}\n" for line in lines if not line.startswith("documents with prompts"))


def test_every_command_says_what_the_page_says(tmp_path, monkeypatch, caplog, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setattr(cli, "_parser", functools.cache(cli._parser))
    monkeypatch.setattr(logging, "basicConfig", lambda **_: None)
    outputs = walk_page(PAGE, lambda line: run(line, caplog, capsys))
    assert outputs == PAGE.count("binidx --data") - 1  # the two of a folder and a pattern share one
