"""The README is true: its commands exist as written, its files are there, it is short."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from rwkv_miss import cli

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def commands() -> list[str]:
    """Each command line of the README's sh blocks, continuations joined, comments dropped."""
    blocks = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.split(" #")[0].strip() for line in lines if line.strip()]


def test_it_is_short():
    assert len(README.splitlines()) <= 200


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("rwkv-miss")])
def test_a_command_is_accepted_as_written(command):
    cli._parse(shlex.split(command)[1:])


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("sh ")])
def test_a_script_and_its_options_exist(command):
    _, script, *arguments = shlex.split(command)
    assert (ROOT / script).is_file()
    if script.endswith("run_miss.sh") and arguments:
        cli._parse(["train", "--tokenizer", "world", *arguments])
    if script.endswith("merge_miss.sh"):
        text = (ROOT / script).read_text()
        assert all(f"{a}) " in text for a in arguments if a.startswith("--"))


def test_the_file_tree_is_what_is_there():
    tree = re.search(r"## Where things are\n\n```\n(.*?)```", README, re.DOTALL).group(1)
    named = set()
    for line in tree.splitlines():
        folder = ROOT / ("rwkv_miss" if line.startswith("  ") else "")
        for name in re.split(r"\s{2,}", line.strip())[0].split(", "):
            assert (folder / name).exists(), f"{line!r}: no {name}"
            named.add(folder / name)
    sources = {p for s in ("*.py", "*.cpp") for p in (ROOT / "rwkv_miss").rglob(s)} | set((ROOT / "cuda").iterdir())
    subpackages = {p for p in sources if p.name == "__init__.py" and p.parent.name != "rwkv_miss"}
    assert sources - subpackages - {ROOT / "rwkv_miss" / "__main__.py"} <= named


def test_the_python_example_names_what_the_package_has():
    import rwkv_miss

    for name in set(re.findall(r"rwkv_miss\.(\w+)\(", README)):
        assert hasattr(rwkv_miss, name)
