"""What answers are judged by: where the model writes them, an extractor; elsewhere, how likely it finds given texts.

This imports no torch: a command asks it what is wrong with an option before it loads a model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rwkv_miss.config import DataOptions, EvalConfig
from rwkv_miss.data.records import Record
from rwkv_miss.errors import UserError
from rwkv_miss.evaluating.answer import Answer, check_answers_file
from rwkv_miss.evaluating.choice import choice_figures, choice_texts, judge_choice
from rwkv_miss.evaluating.extractors import EXTRACTORS, REGEX, Extractor, by_regex, whole
from rwkv_miss.evaluating.last_word import judge_last_word, last_word_figures, last_word_texts
from rwkv_miss.evaluating.rates import pass_at, rate_of

if TYPE_CHECKING:
    from rwkv_miss.evaluating.likelihood import Likelihood


class Judge(NamedTuple):
    """How a record is judged without letting the model write.

    texts: of a record, pairs of a prompt and a text after it, whose likelihoods are wanted; refuses other records.
    answer: the model's answer, from a record, its texts and their likelihoods.
    figures: those of all answers, by the names that JSON has: `right`, `of`, `rate` and `standard_error` among them.
    """

    texts: Callable[[Record, DataOptions], list[tuple[str, str]]]
    answer: Callable[[Record, Sequence[tuple[str, str]], Sequence[Likelihood]], Answer]
    figures: Callable[[Sequence[Answer]], dict[str, Any]]


JUDGES = {
    "choice": Judge(choice_texts, judge_choice, choice_figures),
    "lambada": Judge(last_word_texts, judge_last_word, last_word_figures),
}
"""By the names that `EvalConfig.extract` gives them, as it does the extractors. To add one: one file, one line here."""


def find_extractor(name: str | None) -> Extractor:
    """The extractor of that name; None compares whole answers.

    Raises:
        UserError: there is none, or its pattern is no regular expression.
    """
    if name is None:
        return Extractor(whole)
    if name.startswith(REGEX):
        return by_regex(name.removeprefix(REGEX))
    if name not in EXTRACTORS:
        known = ", ".join([*EXTRACTORS, f"{REGEX}PATTERN", *JUDGES])
        raise UserError(f"extract is {name!r:.40}; it must be one of {known}")
    return EXTRACTORS[name]


def check_scoring(config: EvalConfig) -> None:
    """UserError if answers cannot be judged or saved as the options say; `problems` has looked at each."""
    if config.extract in JUDGES:
        for name in ("samples", "pass_at", "temperature", "top_p"):
            if getattr(config, name) != getattr(EvalConfig, name):
                raise UserError(f"{name} is given, but with extract {config.extract} nothing is written; leave it out")
    else:
        find_extractor(config.extract)
        if config.lead_token:
            raise UserError(
                f"lead_token is given, but only extract {' and '.join(JUDGES)} have use for it; leave it out"
            )
    if config.answers is not None:
        check_answers_file(Path(config.answers), config.overwrite)


def figures(answers: Sequence[Answer], config: EvalConfig) -> dict[str, Any]:
    """The figures of answers in the order of their records, by name."""
    if judge := JUDGES.get(config.extract or ""):
        return judge.figures(answers)
    n = config.samples
    right = [[answer.is_right for answer in answers[i : i + n]] for i in range(0, len(answers), n)]
    found: dict[str, Any] = asdict(rate_of(right))
    if config.exact_match:
        found["exact_match"] = found["rate"]
    if config.pass_at:
        found["pass_at"] = {k: asdict(pass_at(k, right)) for k in config.pass_at}
    return found
