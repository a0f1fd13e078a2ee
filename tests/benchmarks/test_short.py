"""The short form: what it accepts, what it refuses, and that its ways are those that it says."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from torch.utils.flop_counter import FlopCounterMode

from rwkv_miss.benchmarks import short
from rwkv_miss.cli import main


@pytest.fixture
def measured(monkeypatch):
    """name -> the ratios that are measured one after the other, the last one again and again; and how many were."""
    ratios, asked = {}, Counter()

    def measure(name):
        found = ratios[name][min(asked[name], len(ratios[name]) - 1)]
        asked[name] += 1
        return {"name": name, "ratio": found}

    monkeypatch.setattr(short, "CELLS", {"a": None, "b": None})
    monkeypatch.setattr(short, "_measure", measure)
    return ratios, asked


@pytest.fixture
def committed(tmp_path):
    path = tmp_path / "figures.json"
    rows = [{"name": "a", "ratio": 2.0}, {"name": "b", "ratio": 0.5}]
    path.write_text(json.dumps({"tables": [{"title": "", "rows": rows}]}))
    return path


def test_what_is_written_is_what_is_compared_with(measured, tmp_path):
    ratios, _ = measured
    ratios |= {"a": [2.0], "b": [0.5]}
    assert main(["bench", "--what=short", f"--json={tmp_path / 'f.json'}"]) == 0
    assert main(["bench", "--what=short", f"--against={tmp_path / 'f.json'}"]) == 0


def test_a_ratio_is_measured_again_before_it_is_too_much(measured, committed):
    ratios, asked = measured
    ratios |= {"a": [3.1, 9.0, 3.0], "b": [0.1]}
    assert [row["ratio"] for row in short.check_short(committed).rows] == [3.0, 0.1]
    assert asked == {"a": 3, "b": 1}


def test_a_ratio_that_stays_too_much_fails(measured, committed, capsys):
    ratios, asked = measured
    ratios |= {"a": [2.0], "b": [0.76]}
    assert main(["bench", "--what=short", f"--against={committed}"]) == 1
    said = capsys.readouterr().err
    assert "1.5 times slower" in said and "b takes 0.76, it was 0.50" in said and "a takes" not in said
    assert asked == {"a": 1, "b": 4}


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ("[]", "holds no figures"),
        ('{"tables": [{"rows": [{"name": "a"}]}]}', "holds no figures"),
        ('{"tables": [{"rows": [{"name": "a", "ratio": 1}]}]}', "lacks b"),
    ],
)
def test_a_file_without_the_figures(measured, committed, capsys, content, found):
    committed.write_text(content)
    assert main(["bench", "--what=short", f"--against={committed}"]) == 2
    assert found in capsys.readouterr().err


def test_only_the_short_form_is_compared(committed, capsys):
    assert main(["bench", "--what=wkv7", f"--against={committed}"]) == 2
    assert "what is wkv7" in capsys.readouterr().err


@pytest.mark.parametrize("name", list(short.CELLS))
def test_ours_and_the_rival_are_timed(monkeypatch, name):
    monkeypatch.setattr(short, "ROUNDS", 1)
    monkeypatch.setattr(short, "SIZES", short.Sizes(2, 64, 256, 8, 4))
    row = short._measure(name)
    assert row["name"] == name and 0 < row["ratio_min"] <= row["ratio"] <= row["ratio_max"]


@pytest.mark.parametrize("name", ["step of RWKV-7 / its products", "step of RWKV-6 / its products"])
def test_the_products_are_all_of_the_step(monkeypatch, name):
    monkeypatch.setattr(short, "SIZES", short.Sizes(2, 64, 256, 8, 4))
    counts = []
    for way in short.CELLS[name]():
        with FlopCounterMode(display=False) as counter:
            way()
        counts.append(counter.get_total_flops())
    # PyTorch's own counter, which knows no product that is added in place: those are MiSS's.
    assert counts[0] <= counts[1] < 1.05 * counts[0]
