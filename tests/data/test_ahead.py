"""Items made some at a time: the same ones, and the mistake at the same place."""

from __future__ import annotations

from itertools import count

import pytest

from rwkv_miss.data.ahead import ahead
from rwkv_miss.errors import UserError


@pytest.mark.parametrize("n", [0, 1, 63, 64, 65, 1000])
def test_the_items_are_the_same(n):
    assert [*ahead(range(n))] == [*range(n)]


@pytest.mark.parametrize("wrong", [0, 5, 63, 64, 200])
def test_a_mistake_comes_after_the_items_before_it(wrong):
    def make(n):
        if n == wrong:
            raise UserError(f"item {n}")
        return n

    items = ahead(map(make, count()))
    assert [next(items) for _ in range(wrong)] == [*range(wrong)]
    with pytest.raises(UserError, match=rf"^item {wrong}$"):
        next(items)


def test_few_items_are_made_at_a_time():
    made = count()
    assert next(ahead(made)) == 0
    assert next(made) <= 64
