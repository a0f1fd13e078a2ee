"""Multiple choice: which of a record's choices the model finds likeliest after the question.

The figures are acc and acc_norm of lm-evaluation-harness: by the highest sum of log p of a choice's tokens, and by the
highest such sum divided by the characters of the choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from rwkv_miss.config import DataOptions
from rwkv_miss.data.records import Record, Turn
from rwkv_miss.data.rendering import prompt_text, written_text
from rwkv_miss.errors import UserError
from rwkv_miss.evaluating.answer import Answer
from rwkv_miss.evaluating.rates import rate_of

if TYPE_CHECKING:
    from rwkv_miss.evaluating.likelihood import Likelihood


def choice_texts(record: Record, options: DataOptions) -> list[tuple[str, str]]:
    """Of each choice, the prompt and what the model would have to write.

    Raises:
        UserError: the record has no choices.
    """
    if not record.choices:
        raise UserError(
            f"{record.where}: has no choices to choose from; give a question, its answer and a list of choices, and "
            "name that field with choices_field if it is not choices"
        )
    said = [replace(record, turns=(*record.turns[:-1], Turn("assistant", choice))) for choice in record.choices]
    return [(prompt_text(one, options), written_text(one, options)) for one in said]


def judge_choice(record: Record, texts: Sequence[tuple[str, str]], found: Sequence[Likelihood]) -> Answer:
    """The model's answer, from the likelihoods of the choices. Of equal ones the first is chosen."""
    log_p = tuple(likelihood.log_p for likelihood in found)
    per_character = [x / len(choice) for x, choice in zip(log_p, record.choices, strict=True)]
    expected = record.turns[-1].content
    given, by_length = (record.choices[x.index(max(x))] for x in (log_p, per_character))
    return Answer(
        record.where,
        texts[0][0],
        expected,
        given,
        given == expected,
        log_likelihoods=log_p,
        is_right_by_length=by_length == expected,
    )


def choice_figures(answers: Sequence[Answer]) -> dict[str, Any]:
    """acc, and acc_norm as `by_length`."""
    by_length = rate_of([[bool(answer.is_right_by_length)] for answer in answers])
    return asdict(rate_of([[answer.is_right] for answer in answers])) | {"by_length": asdict(by_length)}
