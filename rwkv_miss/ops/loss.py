"""Cross entropy of a language model's head without holding every logit at once."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# The largest number of logits that are held at a time: 256 MiB in float32.
_MAX_LOGITS = 64 * 2**20


def cross_entropy_sum(hidden: Tensor, head: Callable[[Tensor], Tensor], targets: Tensor, vocab_size: int) -> Tensor:
    """The sum of -log softmax(head(hidden))[target] over all positions whose target is not negative.

    The head runs on those positions alone, in pieces. Where there are several pieces, their logits are not kept for the
    backward pass but computed again in it.

    Args:
        hidden: (B, T, C).
        head: (M, C) -> logits (M, vocab_size), for any number M of positions.
        targets: int64 (B, T), the index of the right token; a negative number marks a position without loss.

    Returns:
        A scalar in float32, or in float64 for a float64 model.
    """
    rows = targets.reshape(-1) >= 0
    hidden, targets = hidden.reshape(-1, hidden.shape[-1])[rows], targets.reshape(-1)[rows]

    def piece(h: Tensor, t: Tensor) -> Tensor:
        logits = head(h)
        return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), t, reduction="sum")

    size = max(1, _MAX_LOGITS // vocab_size)
    if len(targets) <= size:
        return piece(hidden, targets)
    pieces = zip(hidden.split(size), targets.split(size), strict=True)
    return torch.stack([checkpoint(piece, h, t, use_reentrant=False) for h, t in pieces]).sum()
