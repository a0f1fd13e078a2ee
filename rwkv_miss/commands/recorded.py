"""What the commands that write a model say of the adapters in it, and the text that a written file is checked on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rwkv_miss.config import DataOptions

if TYPE_CHECKING:
    from rwkv_miss.data.templates import Template
    from rwkv_miss.merging.merge import MergeReport

# A share of an update that is worth a warning where the cast drops more of it.
_MUCH = 0.1
# What the written file is compared on: a question and the beginning of its answer, code, and text that is not English.
_QUESTION, _ANSWER = "Why is the sky blue?", " Because air scatters"
_TEXTS = (
    "def mean(x):\n    return sum(x) /",
    "今天天气很好，我们去",
)


def recorded_template(facts: Sequence[Mapping[str, Any]], given: str | None = None) -> Template:
    """The template that is given, or that the first adapter was trained with, or World's."""
    from rwkv_miss.data.templates import find_template, settled

    return find_template(settled(DataOptions(template=given), facts[0].get("template") if facts else None).template)


def check_text(tokenizers: set[str | None], form: Template) -> tuple[list[int] | None, str]:
    """The token ids of the question in the template and of `_TEXTS`, and what they are; None where the adapters do not
    say which tokenizer they use."""
    from rwkv_miss.data.rendering import chat_prompt
    from rwkv_miss.data.tokenizers import load_tokenizer
    from rwkv_miss.errors import UserError

    [name] = tokenizers if len(tokenizers) == 1 else [None]
    if name is None:
        return None, "random tokens (no tokenizer is recorded)"
    try:
        tokenizer = load_tokenizer(name)
    except UserError:
        return None, f"random tokens (the tokenizer {name} is not there)"
    asked = [chat_prompt(_QUESTION, form) + _ANSWER] if form.user or form.jinja else []
    prompts = [*asked, *_TEXTS]
    return tokenizer.encode("\n\n".join(prompts)), f"{len(prompts)} prompts"


def dropped(report: MergeReport, ways: str) -> list[str]:
    """A warning if the cast to the file's dtype lost much of what was learned; `ways`: what to do."""
    if not (much := report.dropped(_MUCH)):
        return []
    return [
        f"warning: the cast dropped more than {_MUCH:.0%} of the update of {len(much)} layers, most of "
        f"{much[0].name} ({much[0].cast_loss:.0%}): updates smaller than the dtype's steps; merge with {ways}"
    ]


def quantised_base(facts: Sequence[Mapping[str, Any]]) -> list[str]:
    """A note for each form that a base was quantised to in training."""
    return [
        f"an adapter was trained on the base in {quant}; the file has the base's own weights, so its losses are not "
        "quite those of the run"
        for quant in sorted({known["quant"] for known in facts if known.get("quant")})
    ]
