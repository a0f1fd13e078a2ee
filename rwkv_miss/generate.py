"""Text from a model, many prompts at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rwkv_miss.data.tokenizers import END, Tokenizer
from rwkv_miss.errors import RunError, UserError

# A turn of the World template ends where the next one begins (RWKV World / G1 chat format).
STOP = "\n\nUser:"
# Tokens whose text is looked at for STOP: it has 7 bytes, so it spans at most 7 tokens.
_STOP_TOKENS = 8


@torch.no_grad()
def generate(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    max_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> list[str]:
    """What the model writes after each prompt, until the end of the document, `STOP` or max_tokens.

    Args:
        temperature: 0 takes the likeliest token; above, samples from softmax(logits / temperature).
        top_p: samples among the likeliest tokens whose probabilities sum to top_p.

    Raises:
        UserError: an argument out of its range, an empty prompt, or a prompt with tokens the model lacks.
        RunError: the model's logits are not finite.
    """
    if not temperature >= 0 or not 0 < top_p <= 1 or max_tokens < 1:
        raise UserError(
            f"temperature {temperature} must be at least 0, top_p {top_p} above 0 and at most 1, max_tokens "
            f"{max_tokens} at least 1"
        )
    if not 0 <= seed < 2**63:
        raise UserError(f"seed is {seed}; it must be from 0 to 2^63 - 1")
    if not prompts:
        return []
    device = model.emb.weight.device
    ids = [tokenizer.encode(prompt) for prompt in prompts]
    for prompt, tokens in zip(prompts, ids, strict=True):
        if not tokens:
            raise UserError("the prompt is empty; give it at least one character")
        if max(tokens) >= model.config.vocab_size:
            raise UserError(
                f"the prompt {prompt[:40]!r} has token {max(tokens)}, beyond the model's vocabulary of "
                f"{model.config.vocab_size}; choose the tokenizer that the model was trained with"
            )
    # Prompts end together: shorter ones are padded on the left, and the state starts afresh at their first token.
    width = max(map(len, ids))
    tokens = torch.tensor([[END] * (width - len(t)) + t for t in ids], device=device)
    starts = torch.tensor([[width - len(t)] for t in ids], device=device)
    seq_start = torch.arange(width, device=device) == starts
    generator = torch.Generator(device).manual_seed(seed)

    logits, state = model(tokens, seq_start=seq_start)
    written: list[list[int]] = [[] for _ in ids]
    open_ = set(range(len(ids)))
    for _ in range(max_tokens):
        chosen = _choose(logits[:, -1].float(), temperature, top_p, generator)
        for i in sorted(open_):
            written[i].append(int(chosen[i]))
            if written[i][-1] == END or STOP in tokenizer.decode(written[i][-_STOP_TOKENS:]):
                open_.remove(i)
        if not open_:
            break
        logits, state = model(chosen.unsqueeze(1), state)
    return [tokenizer.decode(w).split(STOP)[0] for w in written]


def _choose(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> Tensor:
    """One token id of each row of logits (B, V)."""
    if not torch.isfinite(logits).all():
        raise RunError("the model's logits are not finite; its weights, or the state it begins from, are damaged")
    if temperature == 0:
        return logits.argmax(dim=-1)
    # The floors keep the tiniest temperature and top_p from 0 / 0: in fp32 they are 0.
    below_best = logits - logits.amax(dim=-1, keepdim=True)
    probs, order = torch.softmax(below_best / max(temperature, 1e-30), dim=-1).sort(dim=-1, descending=True)
    # A token stays while those before it have not filled top_p: the likeliest always does.
    probs = probs.masked_fill(probs.cumsum(dim=-1) - probs >= max(top_p, 1e-30), 0)
    return order.gather(1, torch.multinomial(probs, 1, generator=generator)).squeeze(1)
