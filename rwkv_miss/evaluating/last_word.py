"""LAMBADA: how likely the model finds the last word of a text after the rest of it.

The figures are acc and perplexity of lambada_openai in lm-evaluation-harness: how often each token of the word, with
the space before it, is the likeliest one, and e to the mean of -log p of the words. As in BlinkDL's scripts, the word
has tokens of its own, whatever stands before it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from statistics import mean
from typing import TYPE_CHECKING, Any

from rwkv_miss.config import DataOptions
from rwkv_miss.data.records import Record
from rwkv_miss.errors import UserError
from rwkv_miss.evaluating.answer import Answer
from rwkv_miss.evaluating.rates import perplexity, rate_of

if TYPE_CHECKING:
    from rwkv_miss.evaluating.likelihood import Likelihood


def last_word_texts(record: Record, options: DataOptions) -> list[tuple[str, str]]:
    """The text before the last word, and the word with the space before it.

    Raises:
        UserError: the record is no plain text of several words.
    """
    before, space, word = record.turns[0].content.rstrip().rpartition(" ") if record.is_text else ("", "", "")
    if not before:
        raise UserError(f"{record.where}: is no plain text of several words, whose last one could be predicted")
    return [(before, space + word)]


def judge_last_word(record: Record, texts: Sequence[tuple[str, str]], found: Sequence[Likelihood]) -> Answer:
    """The model's answer, which is known if it is the right one."""
    [(before, word)], [likelihood] = texts, found
    right = likelihood.is_likeliest
    return Answer(record.where, before, word, word if right else None, right, log_likelihoods=(likelihood.log_p,))


def last_word_figures(answers: Sequence[Answer]) -> dict[str, Any]:
    """acc, and the perplexity as `word_perplexity`; None where it is more than a float can hold."""
    value = perplexity(-mean(answer.log_likelihoods[0] for answer in answers))
    word_perplexity = value if math.isfinite(value) else None
    return asdict(rate_of([[answer.is_right] for answer in answers])) | {"word_perplexity": word_perplexity}
