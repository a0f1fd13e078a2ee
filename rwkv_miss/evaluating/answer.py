"""An answer of a model, and the file of all of them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rwkv_miss.errors import UserError
from rwkv_miss.files import atomic_write, check_name


@dataclass(frozen=True)
class Answer:
    """What a model was asked (`prompt`), the answer in the data (`expected`), and the model's (`given`).

    where: the record, as messages name it.
    sample: its number among the answers to the record, from 0 on.
    extracted: what was compared of the model's answer; None if that was not found, or the model wrote nothing.
    log_likelihoods: log p of what the model could have answered, in nats: of each choice, or of the last word.
    is_right_by_length: of a choice, whether the one with the highest log p a character is the right one.
    """

    where: str
    prompt: str
    expected: str
    given: str | None
    is_right: bool
    sample: int = 0
    extracted: str | None = None
    log_likelihoods: tuple[float, ...] = ()
    is_right_by_length: bool | None = None


def check_answers_file(path: Path, overwrite: bool) -> None:
    """UserError if answers cannot be written there."""
    check_name(path, "a file of answers")
    if path.suffix != ".jsonl":
        raise UserError(f"{path}: answers are written as .jsonl; give such a name")
    if path.is_dir():
        raise UserError(f"{path}: is a folder; give the name of the file of answers")
    if path.exists() and not overwrite:
        raise UserError(f"{path}: exists already; give another name as answers, or --overwrite true")


def write_answers(path: Path, answers: Iterable[Answer]) -> None:
    """Writes answers to a .jsonl file, whole or not at all.

    Raises:
        UserError: the disk refused.
    """
    with atomic_write(path) as part, part.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(_line(answer), ensure_ascii=False) + "\n" for answer in answers)


def _line(answer: Answer) -> dict[str, Any]:
    """What a line of the file holds. Log-likelihoods are there where the model did not write the answer."""
    line: dict[str, Any] = {"record": answer.where, "prompt": answer.prompt, "expected": answer.expected}
    line |= {"given": answer.given, "right": answer.is_right}
    if not answer.log_likelihoods:
        return line | {"sample": answer.sample, "extracted": answer.extracted}
    line["log_likelihoods"] = answer.log_likelihoods
    return line if answer.is_right_by_length is None else line | {"right_by_length": answer.is_right_by_length}
