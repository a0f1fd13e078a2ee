from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from rwkv_miss.config import EvalConfig
from rwkv_miss.errors import RunError, UserError


def run(config: EvalConfig) -> int:
    """Measure a model's loss and perplexity on data, and how many of its answers are right."""
    if problems := config.problems():
        raise UserError("; ".join(problems))
    from rwkv_miss.evaluating.scoring import check_scoring

    check_scoring(config)
    from rwkv_miss.adapters.files import adapters_template
    from rwkv_miss.commands.model import load
    from rwkv_miss.data.sources import data_name
    from rwkv_miss.data.templates import settled
    from rwkv_miss.evaluating.answer import write_answers
    from rwkv_miss.evaluating.evaluate import evaluate
    from rwkv_miss.evaluating.rates import perplexity
    from rwkv_miss.progress import show_progress

    config = settled(config, adapters_template(config.adapter))
    form = config.dtype, config.quant, config.quant_skip
    model = load(config.model, config.adapter, *form)
    base = load(config.forgetting, None, *form) if config.forgetting else None
    found = evaluate(model, config, show_progress, base)
    if config.answers and found.answers is not None:
        write_answers(Path(config.answers), found.answers)
    if config.json:
        print(json.dumps(found.figures()))
    else:
        for a in (found.answers or [])[: config.show]:
            said = a.prompt.strip() if a.given is None else f"{a.prompt.strip()} {a.given.strip()}"
            print(f"{said}\n  [{'right' if a.is_right else 'wrong, expected: ' + a.expected.strip()}]\n")
        size = f"{found.tokens:,} tokens of {found.records} records"
        if math.isfinite(found.loss):
            print(f"loss {found.loss:.4f} a token, perplexity {perplexity(found.loss):.3f}, {size}")
        else:
            print(f"loss not finite ({found.loss}), {size}")
        for line in _scores(config.extract or "exact match", found.scores or {}):
            print(line)
        if text := found.forgetting:
            assert config.text
            print(
                f"forgetting: loss {text.base_loss:.4f} of the base, {text.loss:.4f} of the model, KL(base || model) "
                f"{text.kl:.4f} a token, {text.tokens:,} tokens of {data_name(config.text)}"
            )
    if not math.isfinite(found.loss):
        raise RunError(f"the loss is not finite ({found.loss}); the weights of the model or of the adapter are damaged")
    return 0


def _scores(name: str, scores: dict[str, Any]) -> list[str]:
    """The figures of answers, each as a line."""
    if not scores:
        return []
    lines = [f"{name}: {_rate(scores)}"]
    if by_length := scores.get("by_length"):
        lines.append(f"{name} by length: {_rate(by_length)}")
    if "word_perplexity" in scores:
        value = scores["word_perplexity"]
        lines.append(f"perplexity of the last words: {math.inf if value is None else value:.3f}")
    lines += [f"pass@{k}: {_share(found)}" for k, found in scores.get("pass_at", {}).items()]
    return lines


def _rate(figures: dict[str, Any]) -> str:
    return f"{figures['right']:,} of {figures['of']:,} ({_share(figures)})"


def _share(figures: dict[str, Any]) -> str:
    error = figures["standard_error"]
    return f"{figures['rate']:.1%}" + ("" if error is None else f" ± {error:.1%}")
