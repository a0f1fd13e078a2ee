"""Model cards: what a model was made of, how, and how it is run, as the README.md that hubs show."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
import yaml

QUESTION = "Why is the sky blue?"
"""What the commands of a card ask."""

_CARD = """\
---
{{ front }}---

# {{ title | span }}

{{ introduction }}
{% for heading, facts in sections.items() if facts %}

## {{ heading | plain }}

{% for name, value in facts.items() %}
- {{ name | plain }}: {{ value | span }}
{% endfor %}
{% endfor %}

## How it was made

{{ commands | join("\n") | block("sh") }}

{% if uses %}
## How it is run

{% for name, (language, code) in uses.items() %}
{{ name }}:

{{ code | block(language) }}

{% endfor %}
{% endif %}
<!-- Written by rwkv-miss {{ version }}.{{ " " ~ end if end }} -->
"""
# The `rwkv` package chooses between versions when it is imported, and has the vocabulary by this name.
_RWKV_PACKAGE = """\
import os

os.environ["RWKV_V7_ON"] = "{v7}"
from rwkv.model import RWKV
from rwkv.utils import PIPELINE, PIPELINE_ARGS

model = RWKV(model={model!r}, strategy="cpu fp32")
pipeline = PIPELINE(model, "rwkv_vocab_v20230424")
arguments = PIPELINE_ARGS(temperature=1.0, top_p=0.5, token_stop=[0])
print(pipeline.generate({prompt!r}, token_count=200, args=arguments))"""


@dataclass(frozen=True)
class Use:
    """What the commands that run a model depend on.

    version: of RWKV. prompt: that of `QUESTION` in the template; None where the template has no form for a question.
    """

    version: int | str
    tokenizer: str
    template: str
    prompt: str | None


def adapter_uses(base: str, folder: str, use: Use) -> dict[str, tuple[str, str]]:
    """The ways to run an adapter in a folder: name -> (language, code)."""
    merged = "merged.pth"
    merge = command("merge", base=base, adapter=folder, out=merged)
    return {
        **_ours(use, {"model": base, "adapter": folder}),
        "As one file for other runtimes": ("sh", merge),
        **_others(use, merged),
    }


def merged_uses(path: str, use: Use) -> dict[str, tuple[str, str]]:
    """The ways to run a merged model: name -> (language, code)."""
    template = {} if use.template == "world" else {"template": use.template}
    return {**_ours(use, {"model": path, **template}), **_others(use, path)}


def command(name: str, **options: str) -> str:
    """A command of ours as a line for a shell."""
    return shlex.join(["rwkv-miss", name, *(part for key, value in options.items() for part in (f"--{key}", value))])


def model_card(
    title: str,
    introduction: str,
    tags: Sequence[str],
    sections: Mapping[str, Mapping[str, Any]],
    commands: Sequence[str],
    uses: Mapping[str, tuple[str, str]],
    *,
    version: str,
    library: str | None = None,
    end: str = "",
) -> str:
    """The card's text. Values may hold anything: they are shown as they are, as code.

    The name of the base on a hub is not known here, so that `base_model` is left to whoever publishes the model.

    Args:
        tags: for the hub. library: the hub's name of the library that loads the model, if it has one.
        sections: heading -> name -> value.
        commands: those that made the model. uses: name -> (language, code).
        end: a sentence about the file itself.
    """
    front = {"pipeline_tag": "text-generation", "tags": list(tags)} | ({"library_name": library} if library else {})
    text = yaml.safe_dump(front, sort_keys=False, allow_unicode=True)
    text += "# base_model: OWNER/NAME of the base on the hub, if you publish this\n"
    env = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    env.filters |= {"span": _span, "block": _block, "plain": _plain}
    return env.from_string(_CARD).render(
        front=text,
        title=title,
        introduction=introduction,
        sections=sections,
        commands=commands,
        uses=uses,
        version=version,
        end=end,
    )


def _ours(use: Use, options: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    if use.prompt is None:
        return {}
    given = {**options, "tokenizer": use.tokenizer}
    return {
        "A question": ("sh", command("generate", **given, prompt=QUESTION)),
        "A conversation": ("sh", command("chat", **given)),
    }


def _others(use: Use, path: str) -> dict[str, tuple[str, str]]:
    if use.tokenizer != "world":
        return {}
    model = path.removesuffix(".pth")  # the package adds it
    code = _RWKV_PACKAGE.format(v7=int(use.version == 7), model=model, prompt=use.prompt or QUESTION)
    gguf = f"{model}.gguf"
    export = command("export", model=path, to="gguf", out=gguf)
    return {
        "The `rwkv` package": ("python", code),
        "llama.cpp and what is built on it": ("sh", f"{export}\n{shlex.join(['llama-cli', '-m', gguf])}"),
    }


def _span(value: object) -> str:
    """A value as a code span, which nothing in it can end (CommonMark 0.31, 6.1)."""
    text = _plain_line(value)
    fence = "`" * (_longest_run(text) + 1)
    pad = " " if text.startswith("`") or text.endswith("`") or not text.strip() else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def _block(code: str, language: str) -> str:
    """Code as a fenced block, which nothing in it can end (CommonMark 0.31, 4.5)."""
    fence = "`" * max(_longest_run(code) + 1, 3)
    return f"{fence}{language}\n{code}\n{fence}"


def _plain(value: object) -> str:
    """A name without what Markdown or HTML would take for its own."""
    return re.sub(r"([\\`*_{}\[\]<>()#+!|&~-])", r"\\\1", _plain_line(value))


def _plain_line(value: object) -> str:
    return re.sub(r"[\x00-\x1f\x7f-\x9f]+", " ", str(value))


def _longest_run(text: str) -> int:
    return max((len(run) for run in re.findall("`+", text)), default=0)
