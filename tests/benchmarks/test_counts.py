"""The counts in docs/performance.md are what the code says."""

from __future__ import annotations

from pathlib import Path

import pytest

from rwkv_miss.benchmarks import table
from rwkv_miss.benchmarks.common import Table
from rwkv_miss.benchmarks.fits import METHODS, SHAPES, fits_row
from rwkv_miss.benchmarks.launches import bench_launches
from rwkv_miss.cli import main

PAGE = Path(__file__).parents[2] / "docs" / "performance.md"


@pytest.fixture
def printed(monkeypatch, capsys):
    """`printed(rows)`: the lines of a table of these rows as `rwkv-miss bench --markdown true` prints them."""

    def lines(rows: list[dict]) -> list[str]:
        monkeypatch.setitem(table.BENCHMARKS, "fits", table.Benchmark(lambda _: Table("Title", rows), False))
        assert main(["bench", "--what=fits", "--markdown=true"]) == 0
        title, blank, *found = capsys.readouterr().out.splitlines()
        assert (title, blank) == ("Title", "")
        return found

    return lines


def test_a_table_in_markdown(printed):
    rows = [{"name": "x", "a_ms": 1.0}, {"name": "y", "b": 2}]
    assert printed(rows) == ["| name | a ms | b |", "| --- | --- | --- |", "| x | 1.00 |  |", "| y |  | 2 |"]


@pytest.mark.slow
def test_the_launches(printed):
    assert "\n".join(printed(bench_launches(1).rows)) in PAGE.read_text()


@pytest.mark.slow
@pytest.mark.parametrize(("method", "shape", "quant"), [("miss", "1.5b", "none"), ("full", "0.4b", "none")])
def test_what_fits(printed, method, shape, quant):
    heading, _, row = printed([fits_row(method, shape, quant)])
    assert heading in PAGE.read_text() and row in PAGE.read_text().splitlines()


def test_the_page_has_every_row_of_what_fits():
    lines = PAGE.read_text().splitlines()
    for method, (quants, _) in METHODS.items():
        assert sum(line.startswith(f"| {method} | ") for line in lines) == len(SHAPES) * len(quants)
