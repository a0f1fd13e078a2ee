"""Cross entropy: the mean of -log p over the tokens that carry loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from rwkv_miss.training.objective import Objective


def _loss_sum(log_probs: Tensor, batch: Mapping[str, Any]) -> Tensor:
    return -log_probs


OBJECTIVE = Objective(_loss_sum)
