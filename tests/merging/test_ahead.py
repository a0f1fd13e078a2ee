"""Results that are computed while those before them are used."""

from __future__ import annotations

import time

import pytest
import torch

from rwkv_miss.merging.ahead import computed_ahead


@pytest.mark.parametrize("sizes", [[64, 8, 64, 8, 8, 64], [100, 1, 1, 1, 1, 1, 90], [10], [1, 2, 3, 200, 3, 2, 1]])
@pytest.mark.parametrize("memory", [0, 300])
def test_no_result_is_overwritten_while_it_is_used(sizes, memory):
    names = {str(i): size for i, size in enumerate(sizes)}
    computed = []

    def compute(name: str, memory: torch.Tensor) -> torch.Tensor:
        computed.append(name)
        return memory.fill_(int(name))

    with computed_ahead(names, compute, memory) as result:
        for i, size in enumerate(sizes):
            found = result(str(i))
            time.sleep(0.01)  # in which the thread overwrites what it may
            assert torch.equal(found, torch.full((size,), i, dtype=torch.uint8))
    assert sorted(computed) == sorted(names)


def test_what_fits_beside_a_result_is_computed_while_it_is_used():
    computed = []

    def compute(name: str, memory: torch.Tensor) -> torch.Tensor:
        computed.append(name)
        return memory

    with computed_ahead({"a": 64, "b": 64, "c": 256, "d": 64, "e": 64}, compute, 0) as result:
        result("a")
        while len(computed) < 2:
            time.sleep(0.001)
        time.sleep(0.05)
        assert sorted(computed) == ["a", "b"]  # c does not fit beside both
        result("b")
        result("c")
        while len(computed) < 4:
            time.sleep(0.001)
        time.sleep(0.05)
        assert sorted(computed) == ["a", "b", "c", "d"]


def test_an_error_is_raised_where_its_result_is_asked_for():
    def compute(name: str, memory: torch.Tensor) -> torch.Tensor:
        if name == "b":
            raise ValueError("b cannot be computed")
        return memory

    with computed_ahead({"a": 64, "b": 64, "c": 64, "d": 512}, compute, 0) as result:
        result("a")
        with pytest.raises(ValueError, match="b cannot"):
            result("b")
