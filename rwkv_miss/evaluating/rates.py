"""How often something is right, and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev


@dataclass(frozen=True)
class Mean:
    """A mean over records, and its standard error: the standard deviation of the records' values, which is estimated
    from them, over the root of their number; None for a single record. lm-evaluation-harness gives the same."""

    rate: float
    standard_error: float | None


@dataclass(frozen=True)
class Rate(Mean):
    """How many answers are right, of how many."""

    right: int
    of: int


def mean_of(values: Sequence[float]) -> Mean:
    """The mean of each record's value."""
    return Mean(mean(values), stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None)


def rate_of(answers: Sequence[Sequence[bool]]) -> Rate:
    """The rate of right ones among the answers to each record, to each as many."""
    found = mean_of([mean(map(float, one)) for one in answers])
    return Rate(found.rate, found.standard_error, sum(map(sum, answers)), sum(map(len, answers)))


def pass_at(k: int, answers: Sequence[Sequence[bool]]) -> Mean:
    """pass@k: how often at least one of k answers to a record is right.

    Estimated without bias from n >= k answers, c of them right, as 1 - C(n - c, k) / C(n, k), by Chen et al. 2021,
    "Evaluating Large Language Models Trained on Code" (arXiv 2107.03374), equation 1.
    """
    return mean_of([1 - math.comb(len(one) - sum(one), k) / math.comb(len(one), k) for one in answers])


def perplexity(loss: float) -> float:
    """e^loss, or infinity where that is more than a float can hold."""
    return math.inf if loss > 700 else math.exp(loss)
