"""The benchmarks of speed: that they measure what they say, and refuse to time a result that is wrong."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
from pathlib import Path

import pytest

from rwkv_miss.benchmarks import miss, tokenizer, wkv7
from rwkv_miss.benchmarks.table import run_benchmarks
from rwkv_miss.cli import main
from rwkv_miss.errors import UserError

PEER = """
from rwkv_miss.ops import wkv7
from torch import exp, log, sigmoid
def rwkv7_wkv_infctx_naive(q, k, v, w, a, b, state=None, scale=1.0):
    p = exp(w + 0.5)  # w = log(sigmoid(z)) - 0.5
    return wkv7(q, log(p / (1 - p)), k, v, a, b * FACTOR, state)
"""


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(wkv7, "ROUNDS", 1)
    monkeypatch.setattr(tokenizer, "TEXT_BYTES", 20_000)
    for name, value in {"WIDTHS": (32,), "TOKENS": (8, 512), "RANK": 8, "ROUNDS": 3}.items():
        monkeypatch.setattr(miss, name, value)


@pytest.fixture
def nothing_installed(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)


def peer(tmp_path: Path, factor: float) -> Path:
    file = tmp_path / "peer.py"
    file.write_text(PEER.replace("FACTOR", str(factor)))
    return file


def test_wkv7_times_ours_and_the_peer(tmp_path):
    rows = wkv7.bench_wkv7(1, peer(tmp_path, 1.0)).rows
    assert [row["name"] for row in rows] == ["cpu", "torch", "rwkvtune naive", "limit"]
    for row in rows:
        assert 0 < row["forward_min"] <= row["forward_median"] and 0 < row["backward_min"] <= row["backward_median"]
    total = [row["forward_min"] + row["backward_min"] for row in rows]
    assert [row["ratio"] for row in rows] == pytest.approx([x / total[0] for x in total])


def test_a_peer_that_disagrees_is_not_timed(tmp_path):
    with pytest.raises(AssertionError, match="rwkvtune naive disagrees"):
        wkv7.bench_wkv7(1, peer(tmp_path, 1.1))


def test_what_is_not_installed_is_said(nothing_installed):
    notes = [row["note"] for table in run_benchmarks("all", 1) for row in table.rows]
    assert notes == ["", "", "", "not installed: pip install --no-deps rwkvtune", "", "not installed: pip install rwkv"]


def test_the_tables_are_printed_and_written(nothing_installed, capsys, tmp_path):
    assert main(["bench", "--what=all", f"--json={tmp_path / 'figures.json'}"]) == 0
    printed = capsys.readouterr().out
    assert "WKV-7" in printed and "World tokenizer" in printed and "rwkvtune" in printed
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["machine"]["CPU"] and figures["machine"]["torch"] and figures["threads"] == 1
    first, second = figures["tables"]
    assert first["title"].startswith("WKV-7") and second["title"].startswith("World tokenizer")
    assert first["rows"][0]["ratio"] == 1.0 and second["rows"][0]["mb_per_s"] > 0


@pytest.mark.slow
def test_the_tokenizer_against_the_trie():
    pytest.importorskip("rwkv")
    ours, trie = tokenizer.bench_tokenizer(1).rows
    assert ours["mb_per_s"] > 0 and trie["ratio"] == pytest.approx(ours["mb_per_s"] / trie["mb_per_s"])


def test_miss_beside_the_frozen_linear_alone(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    rows = miss.bench_miss(1).rows
    assert [row["name"] for row in rows] == [f"{dtype} 32 wide, T {n}" for dtype in ("fp32", "bf16") for n in (8, 512)]
    assert [row["limit"] for row in rows] == 2 * [1 + 3 * 8 / 64, 1 + 8 / 64]  # S D for few rows, W + dW for many
    for row in rows:
        assert row["frozen_ms"] > 0 and 0 < row["miss_min"] <= row["miss"] <= row["miss_max"]
        assert row["note"].startswith("not installed") and "peft_miss" not in row


@pytest.mark.slow
def test_miss_beside_pefts(monkeypatch):
    pytest.importorskip("peft")
    for row in miss.bench_miss(1).rows:
        assert row["peft_miss"] > 0 and row["peft_lora"] > 0 and row["note"] == ""
    modules = miss._peft_modules
    monkeypatch.setattr(miss, "_peft_modules", lambda linear, D: modules(linear, D * 1.1))
    with pytest.raises(AssertionError, match="PEFT's MiSS disagrees"):
        miss.bench_miss(1)


@pytest.mark.parametrize(("what", "threads", "found"), [("gpu", 1, "no 'gpu'"), ("all", 0, "threads is 0")])
def test_wrong_arguments(what, threads, found):
    with pytest.raises(UserError, match=found):
        list(run_benchmarks(what, threads))
