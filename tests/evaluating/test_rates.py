"""Rates, their standard errors, and pass@k by going through every way to take k answers."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import combinations, product
from statistics import mean

import pytest
import torch

from rwkv_miss.evaluating.rates import mean_of, pass_at, rate_of


@pytest.mark.parametrize("n", range(1, 7))
def test_pass_at_k_is_the_share_of_ways_to_take_k_answers(n):
    for k, right in product(range(1, n + 1), range(n + 1)):
        answers = [True] * right + [False] * (n - right)
        ways = [any(taken) for taken in combinations(answers, k)]
        assert pass_at(k, [answers]).rate == pytest.approx(float(Fraction(sum(ways), len(ways))), abs=1e-12)


def test_pass_at_k_does_not_depend_on_n():
    """Without bias: its mean over all that may be drawn is the chance that k answers hold a right one."""
    p, k = 0.3, 2
    for n in (2, 3, 5):
        drawn = product([True, False], repeat=n)
        chance = [math.prod(p if right else 1 - p for right in answers) for answers in product([True, False], repeat=n)]
        found = sum(c * pass_at(k, [answers]).rate for c, answers in zip(chance, drawn, strict=True))
        assert found == pytest.approx(1 - (1 - p) ** k)


def test_pass_at_k_is_a_mean_over_records():
    answers = [[True, False, False], [False] * 3, [True] * 3]
    assert pass_at(1, answers).rate == pytest.approx(mean([1 / 3, 0, 1]))
    assert pass_at(3, answers).rate == pytest.approx(2 / 3)


def test_rates():
    found = rate_of([[True, False], [True, True], [False, False]])
    assert (found.right, found.of, found.rate) == (3, 6, 0.5)
    # Answers to one question are no more than one observation.
    values = torch.tensor([0.5, 1.0, 0.0], dtype=torch.float64)
    assert found.standard_error == pytest.approx((values.std() / math.sqrt(3)).item())
    one = rate_of([[True]] * 30 + [[False]] * 70)
    assert one.standard_error == pytest.approx(math.sqrt(0.3 * 0.7 / 99))
    assert mean_of([0.25]).standard_error is None
