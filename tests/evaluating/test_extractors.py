"""What is found in an answer; GSM8K's as lm-evaluation-harness finds it, by its own filter and settings."""

from __future__ import annotations

import json
import re
from fractions import Fraction
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from rwkv_miss.errors import UserError
from rwkv_miss.evaluating.extractors import EXTRACTORS
from rwkv_miss.evaluating.scoring import find_extractor

GSM8K, LAST_NUMBER, JSON = (EXTRACTORS[name].find for name in ("gsm8k", "last_number", "json"))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("so 48/2 = <<48/2=24>>24.\n#### 72", "72"),
        ("#### 1,234,567.", "1234567"),
        ("#### -3.50 left", "-3.50"),
        ("#### 5\n#### 6", "5"),
        ("####72", None),
        ("#### $5", None),
        ("#### ,", None),
        ("the answer is 72", None),
    ],
)
def test_gsm8k(text, found):
    assert GSM8K(text) == found


def test_gsm8k_is_what_the_harness_compares(reference):
    """On real answers, and on what a model could make of them."""
    pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install 'rwkv-miss[lm_eval]'")
    import lm_eval
    from lm_eval.api.metrics import exact_match_hf_evaluate
    from lm_eval.filters.extraction import RegexFilter

    task = yaml.safe_load((Path(lm_eval.__file__).parent / "tasks" / "gsm8k" / "gsm8k.yaml").read_text())
    [metric] = task["metric_list"]
    options = {name: metric[name] for name in ("ignore_case", "ignore_punctuation", "regexes_to_ignore")}
    strict = RegexFilter(task["filter_list"][0]["filter"][0]["regex_pattern"])
    lines = (reference / "data" / "gsm8k-train.jsonl").read_text().splitlines()
    answers = [json.loads(line)["answer"] for line in lines]
    assert len(answers) == 7473 and None not in map(GSM8K, answers)
    changes = [
        lambda text: text,
        lambda text: text + ".",
        lambda text: text + " dollars",
        lambda text: text.replace("#### ", "#### $"),
        lambda text: text.replace("#### ", "####"),
        lambda text: re.sub(r"(\d)(\d{3})$", r"\1,\2", text),
        lambda text: text + ".0",
        lambda text: text.partition("####")[0],
        lambda text: text + "\n#### 1",
    ]
    right = 0
    for i, expected in enumerate(answers):
        written = changes[i % len(changes)](answers[i - i % 11 % 2])  # some of them answer the question before
        [[theirs]] = strict.apply([[written]], [])
        found = exact_match_hf_evaluate([theirs], [expected], **options)["exact_match"] == 1
        assert (GSM8K(written) == GSM8K(expected)) == found, (written, expected)
        right += found
    assert 1000 < right < 6000


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("It is 72.", "72"),
        ("72.0 or 72.50", "72.5"),
        ("$1,234.50!", "1234.5"),
        ("1, 2,3", "3"),
        ("12,345 then 1,2345", "2345"),
        ("5-3", "3"),
        ("x = -3", "-3"),
        ("−4", "-4"),
        ("-0.0", "0"),
        ("007", "7"),
        (".5", "0.5"),
        ("1" * 5000, "1" * 5000),
        ("none", None),
        ("", None),
    ],
)
def test_last_number(text, found):
    assert LAST_NUMBER(text) == found


@given(st.fractions(), st.integers(0, 3), st.text("ab \n=:$"))
def test_equal_numbers_are_equal_strings(number, zeros, before):
    value = Fraction(round(number * 1000), 1000)
    written = f"{float(value):,.3f}" + "0" * zeros
    assert Fraction(LAST_NUMBER(f"{before} {written}.")) == Fraction(written.replace(",", ""))
    assert LAST_NUMBER(f"7 {written}") == LAST_NUMBER(written.replace(",", ""))


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ('{"a": 1, "b": [2, null]}', '{"b":[2.0,null],\n"a":1}'),
        ("```json\n[1]\n```", "[1]"),
        ("```\n[1]\n```", " [ 1 ] "),
        ('"é"', '"\\u00e9"'),
        ("9007199254740993", "9007199254740993"),
    ],
)
def test_equal_json(text, same):
    assert JSON(text) == JSON(same) is not None


@pytest.mark.parametrize(
    ("text", "other"),
    [("true", "1"), ("[1, 2]", "[2, 1]"), ('"1"', "1"), ("null", "0"), ("9007199254740993", "9007199254740992")],
)
def test_other_json(text, other):
    assert None not in (JSON(text), JSON(other)) and JSON(text) != JSON(other)


@pytest.mark.parametrize("text", ["", "{", "NaN", "Infinity", "{} and more", "[" * 100_000, "1" * 5000, "{'a': 1}"])
def test_no_json(text):
    assert JSON(text) is None


@pytest.mark.parametrize(
    ("pattern", "text", "found"),
    [
        (r"is (\w+)", "it is yes, is no", "yes"),
        (r"(?s).*is (\w+)", "it is yes,\nis no", "no"),
        (r"\d+", "a 12 b 3", "12"),
        (r"(a)|(b)", "xb", "b"),
        (r"(a)?b", "b", "b"),
        (r"\d+", "none", None),
        (r"( *)", "x", None),
    ],
)
def test_regular_expressions(pattern, text, found):
    assert find_extractor(f"regex:{pattern}").find(text) == found


@pytest.mark.parametrize("name", ["", "GSM8K", "regex", "last number"])
def test_no_extractor(name):
    with pytest.raises(UserError, match="must be one of gsm8k, last_number, json, regex:PATTERN, choice, lambada"):
        find_extractor(name)
