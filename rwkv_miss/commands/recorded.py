"""What is recorded with adapters about text, and the text that a written file is checked on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rwkv_miss.config import DataOptions

if TYPE_CHECKING:
    from rwkv_miss.data.templates import Template

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
