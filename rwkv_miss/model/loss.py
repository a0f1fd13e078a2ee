"""The loss of a model on a batch."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from rwkv_miss.ops.loss import cross_entropy_sum


def loss_sum(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """Sum over the batch's loss tokens of -log p(target), fp32. The batch is one of `rwkv_miss.data.batches`."""
    hidden, _ = model.hidden(batch["tokens"], seq_start=batch["seq_start"])
    return cross_entropy_sum(hidden, model.head, batch["targets"], model.config.vocab_size)
