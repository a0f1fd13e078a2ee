"""Cross entropy of a language model's head without holding every logit at once."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# Largest number of logits held at a time: 256 MiB in fp32.
_MAX_LOGITS = 64 * 2**20


def cross_entropy_sum(hidden: Tensor, head: Callable[[Tensor], Tensor], targets: Tensor, vocab_size: int) -> Tensor:
    """Sum of -log softmax(head(hidden))[target] over the positions whose target is not negative, in fp32 (float64
    in a float64 model).

    The head runs on those positions alone, in pieces; with several pieces their logits are computed again in the
    backward pass instead of being kept.

    Args:
        hidden: (B, T, C); targets: int64 (B, T); head: (M, C) -> (M, vocab_size).
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
