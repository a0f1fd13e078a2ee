"""How likely a model finds given texts after others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rwkv_miss.errors import RunError
from rwkv_miss.model.base import RWKV
from rwkv_miss.progress import Report

# The most tokens, over all rows, of one forward pass. Longer rows go on from its state.
_MAX_POSITIONS = 8192
# The most logits at a time: 32 MiB in fp32, of which a few such tensors are needed.
_MAX_LOGITS = 8 * 2**20


class Likelihood(NamedTuple):
    """Of a text after a prompt: the sum of log p of its tokens, in nats, and whether each of them is the likeliest one
    after those before it."""

    log_p: float
    is_likeliest: bool


@torch.no_grad()
def likelihoods(
    model: RWKV, pairs: Sequence[tuple[list[int], list[int]]], batch_size: int, report: Report | None = None
) -> list[Likelihood]:
    """The likelihood of the second of each pair of token ids after the first, which has at least one token.

    Args:
        batch_size: rows that are run together.
        report: is called after each batch with the pairs done and the pairs in all.

    Raises:
        RunError: the model's logits are not finite.
    """
    found: list[Likelihood | None] = [None] * len(pairs)
    order = sorted(range(len(pairs)), key=lambda i: -sum(map(len, pairs[i])))  # rows of about one length together
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        for i, likelihood in zip(rows, _of_batch(model, [pairs[i] for i in rows]), strict=True):
            found[i] = likelihood
        if report:
            report(start + len(rows), len(pairs))
    return [likelihood for likelihood in found if likelihood]


def _of_batch(model: RWKV, pairs: Sequence[tuple[list[int], list[int]]]) -> list[Likelihood]:
    device = model.emb.weight.device
    width = max(len(prompt) + len(text) for prompt, text in pairs) - 1
    # Padding on the right affects no token before it. A target of -1 is none.
    rows = [[*prompt, *text] for prompt, text in pairs]
    tokens = torch.tensor([row[:-1] + [0] * (width - len(row) + 1) for row in rows], device=device)
    targets = torch.full_like(tokens, -1)
    for i, (prompt, text) in enumerate(pairs):
        assert prompt
        targets[i, len(prompt) - 1 : len(rows[i]) - 1] = torch.tensor(text, device=device)
    log_p = torch.zeros(tokens.shape, dtype=torch.float64, device=device)
    is_likeliest = torch.ones(tokens.shape, dtype=torch.bool, device=device)
    n_columns = max(1, _MAX_POSITIONS // len(rows))
    state = None
    for start in range(0, width, n_columns):
        columns = slice(start, start + n_columns)
        hidden, state = model.hidden(tokens[:, columns], state)
        has_target = targets[:, columns] >= 0
        scores = _scores(model, hidden[has_target], targets[:, columns][has_target])
        log_p[:, columns][has_target], is_likeliest[:, columns][has_target] = scores
    if not log_p.isfinite().all():
        raise RunError("the model's logits are not finite; its weights are damaged")
    return [Likelihood(*row) for row in zip(log_p.sum(1).tolist(), is_likeliest.all(1).tolist(), strict=True)]


def _scores(model: RWKV, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """log p of each target (M), float64, and whether it is the likeliest, from the hidden states (M, C) before them."""
    log_p, is_likeliest = [], []
    size = max(1, _MAX_LOGITS // model.config.vocab_size)
    for part, wanted in zip(hidden.split(size), targets.split(size), strict=True):
        logits = model.head(part).float()
        log_p.append(-F.cross_entropy(logits, wanted, reduction="none").double())
        is_likeliest.append(logits.argmax(-1) == wanted)
    return torch.cat(log_p), torch.cat(is_likeliest)
