"""A judge, added as CONTRIBUTING.md describes: a text is right if the model finds it likelier than its reverse."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rwkv_miss.config import DataOptions
from rwkv_miss.data.records import Record
from rwkv_miss.evaluating.answer import Answer
from rwkv_miss.evaluating.likelihood import Likelihood
from rwkv_miss.evaluating.rates import rate_of
from rwkv_miss.evaluating.scoring import Judge


def both_ways(record: Record, options: DataOptions) -> list[tuple[str, str]]:
    text = record.turns[0].content
    return [("\n", text), ("\n", " ".join(reversed(text.split())))]


def the_likelier(record: Record, texts: Sequence[tuple[str, str]], found: Sequence[Likelihood]) -> Answer:
    forwards, backwards = (likelihood.log_p for likelihood in found)
    is_right = forwards > backwards
    given = texts[0 if is_right else 1][1]
    return Answer(record.where, "\n", texts[0][1], given, is_right, log_likelihoods=(forwards, backwards))


def order_figures(answers: Sequence[Answer]) -> dict[str, Any]:
    return asdict(rate_of([[answer.is_right] for answer in answers]))


JUDGE = Judge(both_ways, the_likelier, order_figures)
