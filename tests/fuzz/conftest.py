"""The kit, and a copy of it for each case."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from rwkv_miss import cli
from tests.fuzz.kit import make_kit

# To make the parser takes longer than most cases.
_parser = functools.cache(cli._parser)


@pytest.fixture(scope="session")
def kit(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("kit")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        make_kit()
    return folder


@pytest.fixture
def fresh(kit, tmp_path, monkeypatch) -> Callable[[], None]:
    """`fresh()` makes a new copy of the kit, which becomes the current folder."""
    monkeypatch.setattr(cli, "_parser", _parser)

    def copy() -> None:
        monkeypatch.chdir(tmp_path)
        shutil.rmtree("case", ignore_errors=True)
        shutil.copytree(kit, "case")
        monkeypatch.chdir("case")

    return copy
