"""The README, CONTRIBUTING.md and cluster.md are true: their commands exist as written, their files are there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from rwkv_miss import cli

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
CLUSTER = (ROOT / "docs" / "cluster.md").read_text()
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
CONTRIBUTING_PATHS = sorted(
    {path for path in re.findall(r"`(\.?[\w/.]+\.(?:py|cu|cuh|sh|md)|\.ci/run)`", CONTRIBUTING) if "NAME" not in path}
)


def commands(text: str = README) -> list[str]:
    """Each command line of the text's sh blocks, continuations joined, comments dropped."""
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
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


@pytest.mark.parametrize("command", [c for c in commands(CLUSTER) if " train " in c])
def test_a_command_for_a_cluster_is_accepted_as_written(command, tmp_path, monkeypatch):
    """The launcher's options too, by its own parser."""
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text("base: a.pth\ndata: a.jsonl\ntokenizer: world\nout: out\n")
    before, ours = re.fullmatch(r"(.*)rwkv[-_]miss train ([^\"]*)\"?( &)?", command).group(1, 2)
    cli._parse(["train", *shlex.split(ours)])
    if before.startswith("torchrun "):
        launch = pytest.importorskip("torch.distributed.run")
        assert launch.parse_args([*shlex.split(before)[1:], "rwkv_miss"]).module
    if before.startswith("deepspeed "):
        launch = pytest.importorskip("deepspeed.launcher.runner")
        found = launch.parse_args([*shlex.split(before)[1:], "rwkv_miss", "train"])
        assert found.module and found.no_local_rank and found.hostfile == "hosts"


def test_the_tree_names_every_folder():
    tree = re.search(r"## Where things are\n\n```\n(.*?)```", README, re.DOTALL).group(1)
    named = set()
    for line in tree.splitlines():
        folder = ROOT / ("rwkv_miss" if line.startswith("  ") else "")
        for name in re.split(r"\s{2,}", line.strip())[0].split(", "):
            assert (folder / name).exists(), f"{line!r}: no {name}"
            named.add(folder / name)
    package = ROOT / "rwkv_miss"
    rooms = {path for path in package.rglob("*") if path.is_dir() and path.name != "__pycache__"}
    assert rooms | set(package.glob("*.py")) | {ROOT / "cuda"} <= named


def find(path: str) -> Path | None:
    """The file that CONTRIBUTING.md calls `path`, wherever it is."""
    places = (ROOT, ROOT / "rwkv_miss", ROOT / "tests" / "doors", ROOT / "tests" / "ops" / "cuda")
    return next((place / path for place in places if (place / path).exists()), None)


@pytest.mark.parametrize("path", CONTRIBUTING_PATHS)
def test_contributing_names_what_is_there(path):
    assert find(path)


def test_contributing_names_every_table_and_every_toy():
    toys = {path.name for path in (ROOT / "tests" / "doors").glob("t*_*.py")}
    assert toys <= {Path(path).name for path in CONTRIBUTING_PATHS}
    tables = re.findall(r"`([A-Z]+)` in `([\w/]+\.py)`", CONTRIBUTING)
    assert len(tables) >= 6  # methods, objectives, readers, exports, versions, kernels
    for table, path in tables:
        assert re.search(rf"^{table}\b", find(path).read_text(), re.MULTILINE), (table, path)


def test_the_python_example_names_what_the_package_has():
    import rwkv_miss

    names = set(re.findall(r"rwkv_miss\.(\w+)\(", README))
    assert names and all(hasattr(rwkv_miss, name) for name in names)


def test_each_promise_has_its_test():
    found = re.findall(r"`([\w/]+\.py)::(\w+)`", (ROOT / "docs" / "reliability.md").read_text())
    missing = [f"{file}::{name}" for file, name in found if f"def {name}(" not in (ROOT / "tests" / file).read_text()]
    assert len(found) > 40 and not missing
