"""An objective, added as CONTRIBUTING.md describes: of two consecutive records of the data the first should become
likelier than the second, -log sigmoid(log p(first) - log p(second)), averaged over the pairs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rwkv_miss.training.objective import Objective


def _loss_sum(log_probs: Tensor, batch: Mapping[str, Any]) -> Tensor:
    records = batch["records"]
    present = records >= 0
    numbers, places = torch.unique(records[present], return_inverse=True)  # ascending: pairs stay together
    of_record = log_probs.new_zeros(len(numbers)).index_add(0, places, log_probs[present])
    first, second = of_record.view(-1, 2).unbind(1)
    return -logsigmoid(first - second).sum()


OBJECTIVE = Objective(_loss_sum, group_size=2)
