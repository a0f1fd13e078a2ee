"""The loss of a model on a batch, in one piece or chunk by chunk."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rwkv_miss.model.state import State
from rwkv_miss.ops.loss import cross_entropy_sum


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
        again = i + 1 < len(chunks) and torch.is_grad_enabled()
        run = partial(checkpoint, _chunk_loss, use_reentrant=False) if again else _chunk_loss
        loss, state = run(model, *chunk, state)
        losses.append(loss)
    return torch.stack(losses).sum(), state


def _chunk_loss(
    model: nn.Module, tokens: Tensor, targets: Tensor, seq_start: Tensor, state: State | None
) -> tuple[Tensor, State]:
    hidden, state = model.hidden(tokens, state, seq_start)
    return cross_entropy_sum(hidden, model.head, targets, model.config.vocab_size), state
