"""The model card of a run's adapter."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import rwkv_miss
from rwkv_miss.adapters.files import peft_method
from rwkv_miss.adapters.method import linear_methods
from rwkv_miss.config import TrainConfig
from rwkv_miss.data.rendering import chat_prompt
from rwkv_miss.data.templates import find_template
from rwkv_miss.errors import UserError
from rwkv_miss.export.card import QUESTION, Use, adapter_uses, model_card
from rwkv_miss.model.base import RWKV
from rwkv_miss.training.checks import as_yaml
from rwkv_miss.training.prepare import Prepared
from rwkv_miss.training.report import told_apart
from rwkv_miss.training.reporting import Reporter

# Settings that the card has elsewhere, or that are of the folder and not of the model.
_NOT_OF_THE_MODEL = ("base", "data", "val_data", "out", "resume", "overwrite")
# Those that are told also where they are the defaults.
_ALWAYS = ("adapter.method", "lr", "ctx_len", "batch_size")
# The ends of the paths of what starts the command line.
_PROGRAMS = ("rwkv_miss/__main__.py", "bin/rwkv-miss")


def card_facts(config: TrainConfig, prepared: Prepared, model: RWKV) -> dict[str, Any]:
    """What is recorded with the adapter for its card, but for the results: the card's sections and the command."""
    sizes = model.config
    base = {
        "file": Path(config.base).name,
        "model": f"RWKV-{sizes.version}, {sizes.n_layer} layers of {sizes.n_embd}, vocabulary {sizes.vocab_size:,}",
        "parameters": f"{sum(t.numel() for t in prepared.tensors.values()):,}",
        "fingerprint": model.fingerprint[:12],
    }
    data = {name: str(report) for name, report in prepared.reports}
    if prepared.val_report:
        data["validation"] = str(prepared.val_report)
    changed, rest = told_apart(as_yaml(config))
    always = (*_ALWAYS, *(["adapter.r"] if linear_methods(config.adapter) else []))
    settings = {name: rest[name] for name in always if name in rest} | changed
    settings = {name: value for name, value in settings.items() if name not in _NOT_OF_THE_MODEL}
    program, *arguments = sys.argv
    name = "rwkv-miss" if program.endswith(_PROGRAMS) else program
    return {"card": {"Base": base, "Data": data, "Settings": settings}, "command": shlex.join([name, *arguments])}


def results(step: int, total_steps: int, reporter: Reporter, val_loss: float | None) -> dict[str, str]:
    """What became of the run until an optimizer step."""
    found = {"optimizer steps": f"{step:,} of {total_steps:,}"}
    if reporter.first_loss is not None and reporter.last_loss is not None:
        found["training loss"] = f"from {reporter.first_loss:.4f} to {reporter.last_loss:.4f}"
    if val_loss is not None:
        base = f"from {reporter.base_val_loss:.4f} " if reporter.base_val_loss is not None else ""
        found["validation loss"] = f"{base}to {val_loss:.4f}"
    return found


def adapter_card(folder: Path, config: TrainConfig, model: RWKV, facts: Mapping[str, Any]) -> str:
    """The text of the card in an adapter's folder, from what is recorded with the adapter."""
    method = config.adapter.method
    return model_card(
        Path(config.out).resolve().name,
        f"An adapter for RWKV-{model.config.version}, trained with the method {method}.",
        tags_of(model.config.version, method),
        facts["card"],
        [facts["command"]],
        adapter_uses(config.base, str(folder), use_of(model.config.version, config.tokenizer, config.template)),
        version=rwkv_miss.__version__,
        library="peft" if peft_method(model) else None,
        end="The run replaces this file whenever it saves the adapter: copy the folder before you edit it.",
    )


def tags_of(version: int | str, method: str) -> list[str]:
    return ["rwkv", f"rwkv-{version}", *method.split("+")]


def use_of(version: int | str, tokenizer: str, template: str | None) -> Use:
    """What the commands depend on that run a model with this template."""
    form, prompt = find_template(template), None
    if form.user or form.jinja:
        with suppress(UserError):  # a template in Jinja may refuse whatever it likes
            prompt = chat_prompt(QUESTION, form)
    return Use(version, tokenizer, template or "world", prompt)
