"""The loss of a model on a batch, in one piece or chunk by chunk."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rwkv_miss.model.state import State

# Chunks from one return of freed memory to the next: each costs up to a third of a chunk's time.
_TIDY_EVERY = 4


def loss_sum(
    model: nn.Module, batch: dict[str, Any], state: State | None = None, chunk_len: int | None = None
) -> tuple[Tensor, State]:
    """Sum over the batch's loss tokens of -log p(target), fp32, and the state after its last column.

    Args:
        batch: one of `rwkv_miss.data.batches`.
        state: what the columns before these left; None where the rows begin.
        chunk_len: run this many columns at a time, the state carried on. The result and its gradients are those
            of the whole, but the backward pass computes every chunk but the last again: it holds the activations
            of one chunk, and the states between chunks. None runs the batch as it is.
    """
    columns = (batch[name] for name in ("tokens", "targets", "seq_start"))
    chunks = list(zip(*(x.split(chunk_len or x.shape[1], dim=1) for x in columns), strict=True))
    losses = []
    for i, chunk in enumerate(chunks):
        if i + 1 < len(chunks) and torch.is_grad_enabled():
            tidy = i % _TIDY_EVERY == 0
            loss, state = checkpoint(_chunk_loss, model, *chunk, state, tidy, use_reentrant=False)
        else:
            loss, state = _chunk_loss(model, *chunk, state)
        losses.append(loss)
    return torch.stack(losses).sum(), state


def _chunk_loss(
    model: nn.Module, tokens: Tensor, targets: Tensor, seq_start: Tensor, state: State | None, tidy: bool = False
) -> tuple[Tensor, State]:
    if tidy and tokens.device.type == "cpu":
        _return_freed_memory()
    hidden, state = model.hidden(tokens, state, seq_start)
    return model.head(hidden, targets), state


def _return_freed_memory() -> None:
    """The graph's small nodes stay between a chunk's activations, and when those are freed, glibc (2.36) does not
    find place there for aligned blocks of the same size: from chunk to chunk, what was freed adds up. Other C
    libraries have no such call."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)
