r"""What is compared of an answer: an extractor finds it in the text, and writes equal values as equal strings.

`gsm8k` finds what openai/grade-school-math finds, and lm-evaluation-harness in its strict-match: `#### (\-?[0-9\.\,]+)`
at its first place, without commas and without a full stop at the end.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import NamedTuple, NoReturn

from rwkv_miss.errors import UserError

REGEX = "regex:"
"""What stands before the pattern in the name of an extractor that is a regular expression."""

_GSM8K = re.compile(r"#### (-?[0-9.,]+)")
# Commas stand before each three digits, or nowhere. A minus after a number or a word is none of the number's.
_NUMBER = re.compile(r"(?:(?<![\w.)])[-−])?(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)")
_FENCE = re.compile(r"```(?:json)?\s*\n(.*)\n\s*```", re.DOTALL)


class Extractor(NamedTuple):
    """find: what is compared of an answer; None if it is not there, and the model's answer is then wrong.

    may_be_whole: whether a data's answer in which nothing is found is itself what the model's is compared with;
    otherwise the record is refused.
    """

    find: Callable[[str], str | None]
    may_be_whole: bool = False


def whole(text: str) -> str:
    """All of the answer."""
    return text


def gsm8k(text: str) -> str | None:
    """The number after the first `####`, as a string without commas."""
    found = _GSM8K.search(text)
    return found[1].replace(",", "").removesuffix(".") or None if found else None


def last_number(text: str) -> str | None:
    """The last number, without commas and needless zeros: 72.0 is 72."""
    if not (found := _NUMBER.findall(text)):
        return None
    number = found[-1].replace(",", "").replace("−", "-")
    whole, _, decimals = number.removeprefix("-").partition(".")
    size = f"{whole.lstrip('0') or '0'}.{decimals.rstrip('0')}".removesuffix(".")
    return f"-{size}" if number[0] == "-" and size != "0" else size


def json_value(text: str) -> str | None:
    """The text as JSON, which may stand in a fence (```json), with the names of objects in their order."""
    text = text.strip()
    if fenced := _FENCE.fullmatch(text):
        text = fenced[1]
    try:
        value = json.loads(text, parse_float=_whole_if_it_is, parse_constant=_refuse)
        return json.dumps(value, sort_keys=True, ensure_ascii=False)
    except (ValueError, RecursionError):  # also a number of too many digits, and nesting too deep
        return None


def by_regex(pattern: str) -> Extractor:
    """What a regular expression matches at its first place: its first group that takes part, if it has groups."""
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise UserError(f"extract: {pattern!r} is not a regular expression ({error})") from None

    def find(text: str) -> str | None:
        found = compiled.search(text)
        if not found:
            return None
        return next((group for group in found.groups() if group is not None), found[0]).strip() or None

    return Extractor(find, may_be_whole=True)


EXTRACTORS = {
    "gsm8k": Extractor(gsm8k),
    "last_number": Extractor(last_number),
    "json": Extractor(json_value),
}
"""The extractors by the names that `EvalConfig.extract` gives them. To add one: a function here, and its line."""


def _whole_if_it_is(digits: str) -> int | float:
    number = float(digits)
    return int(number) if number.is_integer() else number


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
