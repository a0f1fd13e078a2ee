"""The log-probabilities that a model gives to a batch's targets, in one piece or chunk by chunk."""

from __future__ import annotations

import ctypes
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rwkv_miss.model.base import RWKV
from rwkv_miss.model.state import State

# Freed memory is returned to the system once in so many chunks; each time costs up to a third of a chunk's time.
_TRIM_EVERY = 4


def batch_log_probs(
    model: RWKV,
    batch: dict[str, Any],
    state: State | None = None,
    chunk_len: int | None = None,
    reduction: Literal["sum", "none"] = "sum",
) -> tuple[Tensor, State]:
    """log p(target) of the batch's positions that have a target, fp32 (float64 in a float64 model), and the state after
    its last column.

    Args:
        batch: `tokens` and `targets` int64 (B, T), `seq_start` bool (B, T), as `rwkv_miss.data.batches` makes them.
        state: the state after the columns before these; None at the beginning of the rows.
        chunk_len: run this many columns at a time and carry the state on. The result and its gradients are the same,
            but only one chunk's activations and the states between chunks are in memory: the backward pass computes
            every chunk but the last a second time. None runs the batch whole.
        reduction: "sum" gives their sum, (); "none" each position's own, (B, T), 0 where there is no target.
    """
    columns = (batch[name] for name in ("tokens", "targets", "seq_start"))
    chunks = list(zip(*(x.split(chunk_len or x.shape[1], dim=1) for x in columns), strict=True))
    found = []
    for i, (tokens, targets, seq_start) in enumerate(chunks):
        chunk = (model, tokens, targets, seq_start, state, reduction)
        if i + 1 < len(chunks) and torch.is_grad_enabled():
            trim = i % _TRIM_EVERY == 0
            scores, state = checkpoint(_chunk_log_probs, *chunk, trim, use_reentrant=False)
        else:
            scores, state = _chunk_log_probs(*chunk)
        found.append(scores)
    assert state is not None, "a batch has at least one column"
    return torch.stack(found).sum() if reduction == "sum" else torch.cat(found, dim=1), state


def _chunk_log_probs(
    model: RWKV,
    tokens: Tensor,
    targets: Tensor,
    seq_start: Tensor,
    state: State | None,
    reduction: Literal["sum", "none"],
    trim: bool = False,
) -> tuple[Tensor, State]:
    if trim and tokens.device.type == "cpu":
        _give_freed_memory_back()
    hidden, state = model.hidden(tokens, state, seq_start)
    return model.head(hidden, targets, reduction), state


def _give_freed_memory_back() -> None:
    """Asks glibc to return freed memory to the system. Small nodes of the autograd graph stay between the activations
    of a chunk; when the activations are freed, glibc (2.36) cannot reuse the gaps for aligned blocks of the same size,
    so the freed memory adds up from chunk to chunk. Other C libraries have no such call."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)
