"""The settings in configs/: each can be trained with, and takes no more memory than its first line says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from rwkv_miss.cli import _arguments, _parse
from rwkv_miss.commands import train
from rwkv_miss.config import PlanConfig, TrainConfig
from rwkv_miss.planning.fit import parse_bytes
from rwkv_miss.planning.report import plan

FOLDER = Path(__file__).parents[2] / "configs"
PRESETS = sorted(FOLDER.glob("*.yaml"))
REST = ["--base=base.pth", "--data=data.jsonl", "--out=out"]


def settings(path: Path) -> TrainConfig:
    """What `rwkv-miss train --config PRESET` trains with."""
    options, _ = _parse(["train", f"--config={path}", *REST])
    return _arguments(train.run, options)["config"]


def test_there_are_presets():
    assert len(PRESETS) >= 8


@pytest.mark.slow
@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_a_preset_fits_into_the_memory_that_it_names(path):
    said = re.match(r"# RWKV-(\d) (\S+) in (\d+ GB): ", path.read_text())
    assert said, "the first line says which model it is for and how much memory"
    if "quant:" in path.read_text():
        pytest.importorskip("bitsandbytes")
    config = PlanConfig(**vars(settings(path)) | {"version": int(said[1]), "shape": said[2]})
    found = plan(config)
    assert found.device <= parse_bytes(said[3])
    if host := re.search(r"about (\d+) GB of it", path.read_text()):
        assert found.host / 2**30 == pytest.approx(float(host[1]), rel=0.1)


@pytest.mark.parametrize(("name", "trained"), [("rwkv7-3b-metamath", 47.2), ("rwkv6-7b-metamath", 88.1)])
def test_the_settings_of_the_paper(name, trained):
    """arXiv 2409.15371, tables 10 and 11: r 64, lr 2e-5, cosine, no warm-up, 64 rows of 512 in a step, one epoch."""
    config = settings(FOLDER / f"{name}.yaml")
    assert (config.adapter.method, config.adapter.r, config.adapter.dropout) == ("miss", 64, 0)
    assert (config.lr, config.schedule, config.warmup_steps, config.epochs) == (2e-5, "cosine", 0, 1)
    assert (config.ctx_len, config.batch_size * config.accumulate * config.devices) == (512, 64)
    assert f"{trained}M parameters are trained" in (FOLDER / f"{name}.yaml").read_text()


def test_every_preset_is_in_the_docs():
    text = (FOLDER.parent / "docs" / "presets.md").read_text()
    assert re.findall(r"^\| `(\S+)` \|", text, re.MULTILINE) == [path.stem for path in PRESETS]
