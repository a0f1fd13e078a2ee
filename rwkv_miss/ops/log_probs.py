"""The log-probabilities that a language model's head gives to the targets, without holding every logit at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# Largest number of logits held at a time: 256 MiB in fp32.
_MAX_LOGITS = 64 * 2**20


def target_log_probs(
    hidden: Tensor,
    head: Callable[[Tensor], Tensor],
    targets: Tensor,
    vocab_size: int,
    reduction: Literal["sum", "none"] = "sum",
) -> Tensor:
    """log softmax(head(hidden))[target] of the positions whose target is not negative, in fp32 (float64 in a float64
    model).

    The head runs on those positions alone, in pieces of at most `_MAX_LOGITS` logits. With several pieces their logits
    are computed again in the backward pass instead of being kept. Differentiable with respect to hidden and to what
    the head uses.

    Args:
        hidden: (B, T, C).
        head: (M, C) -> (M, vocab_size).
        targets: int64 (B, T).
        reduction: "sum" gives their sum, (); "none" each position's own, (B, T), 0 where there is no target.
    """
    has_target = targets.reshape(-1) >= 0
    rows, wanted = hidden.reshape(-1, hidden.shape[-1])[has_target], targets.reshape(-1)[has_target]

    def piece(h: Tensor, t: Tensor) -> Tensor:
        logits = head(h)
        return -F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), t, reduction=reduction)

    size = max(1, _MAX_LOGITS // vocab_size)
    if len(wanted) <= size:
        found = [piece(rows, wanted)]
    else:
        pieces = zip(rows.split(size), wanted.split(size), strict=True)
        found = [checkpoint(piece, h, t, use_reentrant=False) for h, t in pieces]
    if reduction == "sum":
        return found[0] if len(found) == 1 else torch.stack(found).sum()
    values = torch.cat(found)
    return values.new_zeros(targets.numel()).masked_scatter(has_target, values).view(targets.shape)
