from __future__ import annotations

import json
import math

from rwkv_miss.config import EvalConfig
from rwkv_miss.errors import RunError, UserError


def run(config: EvalConfig) -> int:
    """Measure a model's loss and perplexity on data, and how many of its answers are right."""
    if problems := config.problems():
        raise UserError("; ".join(problems))
    from rwkv_miss.adapters.files import adapters_template
    from rwkv_miss.commands.model import load
    from rwkv_miss.data.sources import data_name
    from rwkv_miss.data.templates import settled
    from rwkv_miss.evaluate import evaluate, perplexity
    from rwkv_miss.progress import show_progress

    config = settled(config, adapters_template(config.adapter))
    form = config.dtype, config.quant, config.quant_skip
    model = load(config.model, config.adapter, *form)
    base = load(config.forgetting, None, *form) if config.forgetting else None
    found = evaluate(model, config, show_progress, base)
    if config.json:
        print(json.dumps(found.figures()))
    else:
        for a in (found.answers or [])[: config.show]:
            print(f"{a.prompt.strip()} {a.given}\n  [{'right' if a.is_right else 'wrong, expected: ' + a.expected}]\n")
        size = f"{found.tokens:,} tokens of {found.records} records"
        if math.isfinite(found.loss):
            print(f"loss {found.loss:.4f} a token, perplexity {perplexity(found.loss):.3f}, {size}")
        else:
            print(f"loss not finite ({found.loss}), {size}")
        if found.answers is not None:
            figures = found.figures()
            print(f"exact match: {figures['right']} of {found.records} ({figures['exact_match']:.1%})")
        if text := found.forgetting:
            assert config.text
            print(
                f"forgetting: loss {text.base_loss:.4f} of the base, {text.loss:.4f} of the model, KL(base || model) "
                f"{text.kl:.4f} a token, {text.tokens:,} tokens of {data_name(config.text)}"
            )
    if not math.isfinite(found.loss):
        raise RunError(f"the loss is not finite ({found.loss}); the weights of the model or of the adapter are damaged")
    return 0
