"""The loss of a model on a batch."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def loss_sum(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """Sum over the batch's loss tokens of -log p(target), fp32. The batch is one of `rwkv_miss.data.batches`."""
    hidden, _ = model.hidden(batch["tokens"], seq_start=batch["seq_start"])
    return model.head(hidden, batch["targets"])
