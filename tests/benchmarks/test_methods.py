"""The table of the methods: nothing in it is further from PEFT's than rounding."""

from __future__ import annotations

import pytest

from rwkv_miss.adapters.method import METHODS, LinearMethod, find_methods
from rwkv_miss.benchmarks.methods import VERSIONS, bench_methods

LARGEST = {"forward": 1e-5, "gradients": 5e-5, "merge": 1e-5, "PEFT_reads_ours": 1e-5, "we_read_PEFTs": 1e-5}


@pytest.mark.slow
def test_the_methods_are_pefts():
    pytest.importorskip("peft")
    table = bench_methods(1)
    beside_linears = {name for name in METHODS if isinstance(find_methods(name)[0], LinearMethod)}
    assert {(row["method"].split(",")[0], row["RWKV"]) for row in table.rows} == {
        (name, version) for name in beside_linears for version in VERSIONS
    }
    for row in table.rows:
        for column, largest in LARGEST.items():
            assert row[column] <= largest, (row, column)
