"""The demo, as the README says to run it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from tests.processes import run_process

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "scripts" / "demo"


@pytest.fixture(scope="module")
def virtual_env(tmp_path_factory) -> Path:
    """An environment of the tests' own, into which the scripts need to install nothing: it has what this one has."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    paths = {"base": str(folder), "platbase": str(folder)}
    packages = Path(sysconfig.get_path("purelib", vars=paths))
    # Links and not a .pth file, since NVRTC is looked for in the environment's own folder.
    for installed in Path(sysconfig.get_path("purelib")).iterdir():
        (packages / installed.name).symlink_to(installed)
    shutil.copy(ROOT / "pyproject.toml", folder / ".rwkv_miss")
    return folder


@pytest.fixture(scope="module")
def sh(tmp_path_factory, virtual_env):
    """`sh(script, *arguments)` runs one of our scripts, in a folder like the one that holds the clone: it has a folder
    of the package's name."""
    folder = tmp_path_factory.mktemp("demo")
    (folder / "rwkv_miss").mkdir()

    def run(script: str, *arguments: str) -> subprocess.CompletedProcess:
        command = ["sh", str(ROOT / "scripts" / script), *arguments]
        environment = os.environ | {"VIRTUAL_ENV": str(virtual_env)}
        return run_process(command, 900, cwd=folder, env=environment)

    return run


@pytest.fixture(scope="module")
def demo(sh):
    return sh("run_miss.sh")


def test_the_demo_learns_what_its_base_cannot_do(demo):
    assert demo.returncode == 0, demo.stderr
    before, after = (int(n) for n in re.findall(r"exact match: (\d+) of 200", demo.stdout))
    assert before < 20 and after > 180


def test_the_merged_demo_gives_the_same_answers(demo, sh):
    done = sh("merge_miss.sh")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "merged file in the rwkv package" in done.stdout and "the same answers from all" in done.stdout


def test_run_miss_with_a_base_and_data_of_ones_own(sh):
    arguments = ["--base", str(DEMO / "base.pth"), f"--data={DEMO / 'heldout.jsonl'}", "--tokenizer", "bytes"]
    done = sh("run_miss.sh", *arguments, "--out", "mine", "--max_steps", "1", "--adapter.r", "8", "--lr", "0.001")
    assert done.returncode == 0, done.stderr
    assert "exact match" not in done.stdout and "1 steps done" in done.stdout
    again = sh("run_miss.sh", *arguments, "--out", "mine", "--max_steps", "1")
    assert again.returncode == 2 and "holds another run" in again.stderr
    merged = sh("merge_miss.sh", "--run", "mine", "--out=mine.pth", "--dtype", "fp32")
    assert merged.returncode == 0 and "float32" in merged.stdout, merged.stderr


@pytest.mark.parametrize(
    "script, arguments, message",
    [
        ("run_miss.sh", ["--data", "x.jsonl"], "--data needs --base"),
        ("run_miss.sh", ["--base", "x.pth"], "--base needs --data"),
        ("run_miss.sh", ["--base"], "--base needs a value"),
        ("run_miss.sh", ["--base", "x.pth", "--data", "x.jsonl"], "x.pth: no such file"),
        ("merge_miss.sh", ["--run", "nowhere"], "nowhere: holds no run"),
        ("merge_miss.sh", ["--rnu", "x"], "unknown option --rnu"),
    ],
)
def test_scripts_refuse_what_they_do_not_understand(sh, script, arguments, message):
    done = sh(script, *arguments)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


def test_gpu_check_runs_to_its_end(sh, tmp_path):
    done = sh("gpu_check.sh", "--json", str(tmp_path / "results.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    for op in ("wkv6", "wkv7"):
        assert f"{op}.cu for sm_75" in done.stdout
        assert f"{op} against the reference" in done.stdout or f"{op}, cuda: training step, 0.1B" in done.stdout
    assert json.loads((tmp_path / "results.json").read_text())["right"] is True
    wrong = sh("gpu_check.sh", "--json", str(tmp_path / ("x" * 300)))
    assert wrong.returncode == 2 and "cannot be the name of the results' file" in wrong.stderr


def test_the_data_is_what_make_data_makes(tmp_path):
    subprocess.run([sys.executable, str(DEMO / "make_data.py"), "--out", str(tmp_path)], check=True, timeout=120)
    for name in ("train.jsonl", "heldout.jsonl"):
        assert (tmp_path / name).read_bytes() == (DEMO / name).read_bytes(), name


def test_the_base_is_small_enough_to_ship():
    assert (DEMO / "base.pth").stat().st_size <= 4 * 2**20
