"""docs/runtimes.md is true: its commands run, and its tests are there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from rwkv_miss import AdapterConfig, cli
from rwkv_miss.export.table import ADAPTER_TARGETS, TARGETS
from tests.helpers import save_random_adapter

PAGE = (Path(__file__).parents[1] / "docs" / "runtimes.md").read_text()
COMMANDS = re.findall(r"^rwkv-miss (.*)$", PAGE, re.MULTILINE)


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_runs_as_written(command, make_base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    n_vocab = 256 if "--adapter" in command else 65536  # what is not said otherwise is taken for World's
    base = make_base(n_embd=64, head_size=64, vocab_size=n_vocab)
    save_random_adapter(base, Path("out/mine/adapter"), AdapterConfig(r=4), tokenizer="bytes")
    arguments = shlex.split(command)
    assert cli.main(arguments) == 0
    assert Path(arguments[arguments.index("--out") + 1]).exists()


def test_every_target_is_there():
    written = {name for name, target in TARGETS.items() if target.dtypes} | ADAPTER_TARGETS.keys()
    assert {to for command in COMMANDS for to in re.findall(r"--to (\S+)", command)} == written


def test_the_tests_are_there():
    files = set(re.findall(r"`([\w/]+\.py)`", PAGE))
    assert files and all((Path(__file__).parent / file).is_file() for file in files)
