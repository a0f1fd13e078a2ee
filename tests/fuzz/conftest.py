"""The kit, and a copy of it for each case."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rwkv_miss import cli
from tests.fuzz.kit import make_kit


@pytest.fixture(scope="session")
def kit(tmp_path_factory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("kit")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "_parser", functools.cache(cli._parser))  # to make it takes longer than most cases
        patch.chdir(folder)
        make_kit()
        yield folder


@pytest.fixture
def fresh(kit, tmp_path, monkeypatch) -> Callable[[], None]:
    """`fresh()` makes a new copy of the kit, which becomes the current folder."""

    def copy() -> None:
        monkeypatch.chdir(kit)
        shutil.rmtree(tmp_path / "case", ignore_errors=True)
        shutil.copytree(kit, tmp_path / "case")
        monkeypatch.chdir(tmp_path / "case")

    return copy
