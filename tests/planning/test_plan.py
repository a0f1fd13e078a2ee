"""The command `rwkv-miss plan`."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from rwkv_miss.cli import main
from rwkv_miss.config import PlanConfig
from rwkv_miss.planning import fit
from rwkv_miss.planning.fit import parse_bytes

SMALL = ["plan", "--shape=0.1b", "--ctx_len=128"]


def planned(capsys, *arguments: str) -> dict:
    assert main([*SMALL, *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.slow
def test_what_is_printed(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    assert main([*SMALL, "--gpu_memory=2GB", "--batch_size=1"]) == 0
    out = capsys.readouterr().out
    for part in ("weights, frozen", "optimizer state", "activations", "logits", "each GPU", "fits into 2GB"):
        assert part in out
    assert main([*SMALL, "--wkv_backend=cpu"]) == 0
    assert "each process" in capsys.readouterr().out


@pytest.mark.slow
def test_the_largest_batch_is_the_largest(capsys):
    found = planned(capsys, "--gpu_memory=1.5GB")
    for batch_size, fits in ((found["batch_size"], True), (found["batch_size"] + 1, False)):
        assert (planned(capsys, f"--batch_size={batch_size}")["device"] <= 1.5 * 2**30) == fits


@pytest.mark.parametrize(
    "takes",
    [
        lambda rows: 3 + 7 * rows,
        lambda rows: max(4000, 7 * rows),  # the optimizer's step takes the most, whatever the rows
        lambda rows: 11 * rows if rows < 40 else 100 + 7 * rows,  # adapters are folded into their weights
        lambda rows: max(20 * min(rows, 20), 7 * rows),
    ],
)
@pytest.mark.parametrize("limit", [10, 18.5, 3999, 4000, 5000, 1e6])
def test_the_largest_batch_is_found_in_few_tries(monkeypatch, takes, limit):
    tried = []

    def count(base, config):
        tried.append(config.batch_size)
        return SimpleNamespace(device=takes(config.batch_size))

    monkeypatch.setattr(fit, "memory", count)
    found = fit.largest_batch(None, PlanConfig(), limit)
    assert takes(found + 1) > limit and (not found or takes(found) <= limit)
    assert len(tried) <= 25


@pytest.mark.slow
def test_a_smaller_micro_batch_has_the_same_rows(capsys):
    found = planned(capsys, "--gpu_memory=1.2GB", "--batch_size=64", "--accumulate=3")
    said = found["lines"][-1].split("--batch_size ")[1].split()
    batch_size, accumulate = int(said[0]), int(said[2])
    assert batch_size <= found["batch_size"] < 64 and batch_size * accumulate == 192


@pytest.mark.slow
def test_what_to_change_where_no_batch_fits(capsys):
    found = planned(capsys, "--gpu_memory=1.5GB", "--ctx_len=4096", "--precision=fp32")
    assert found["batch_size"] == 0
    title = next(line for line in found["lines"] if "does not fit into 1.5GB with any batch_size" in line)
    first, second, *rest = found["lines"][found["lines"].index(title) + 1 :]
    assert first.startswith("  batch_size 1, accumulate 8: ") and second.startswith("  precision bf16: ")
    sizes = [float(line.split(": ")[1].split()[0]) for line in (first, second, *rest)]
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] <= 1.5 < sizes[-2]


def test_a_file_and_its_model_by_name_are_the_same(capsys, make_base):
    base = make_base(n_layer=3, n_embd=64, vocab_size=256, dtype=torch.bfloat16)
    assert main(["plan", f"--base={base}", "--ctx_len=16", "--adapter.r=8", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["trained"] == 8 * (4 * 64 + 256 + 64) * 3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["plan"], "neither shape nor base is given; give --shape 1.5b"),
        (["plan", "--shape=2b"], "shape is '2b' of RWKV-7; there are of RWKV-7: 0.1b"),
        (["plan", "--shape=1.5b", "--version=6"], "shape is '1.5b' of RWKV-6"),
        ([*SMALL, "--gpu_memory=24XB"], "gpu_memory is '24XB'; give a size such as 24GB"),
        ([*SMALL, "--batch_size=0"], "batch_size is 0; it must be at least 1"),
        ([*SMALL, "--adapter.method=mis"], "adapter.method is 'mis'"),
        ([*SMALL, "--adapter.r=9999"], "r is 9999 but the linear has only 768 inputs"),
        (["plan", "--base=none.pth"], "none.pth: no such file"),
    ],
)
def test_a_mistake(capsys, arguments, said):
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert said in err and len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "size"), [("24GB", 24 * 2**30), ("24 GiB", 24 * 2**30), ("512mb", 512 * 2**20), ("7.5", 7.5 * 2**30)]
)
def test_sizes(text, size):
    assert parse_bytes(text) == size
