"""What training minimises, and the table of the objectives. Importing this imports no torch."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Objective:
    """A loss that is a mean of terms over an optimizer step: a term for each token that carries loss, or one for each
    group of records.

    loss_sum: (log-probabilities, batch) -> the sum of the terms of a micro-batch, (), differentiable. Without a
        `group_size` the log-probabilities are the sum of log p(target) over the micro-batch, (); with one, those of
        each position, (B, T), 0 where there is no target, and `batch["records"]`, int64 (B, T), says which record a
        position belongs to, -1 where it is padding. The batch is one of `rwkv_miss.data.batches`.
    group_size: how many consecutive records of the data make one term, such as 2 for pairs; they share a row. None:
        each token that carries loss is a term.
    """

    loss_sum: Callable[[Tensor, Mapping[str, Any]], Tensor]
    group_size: int | None = None

    def terms_of_step(self, batch: Mapping[str, Any]) -> int:
        """The number of terms in the whole optimizer step of a micro-batch, over all its micro-batches and ranks."""
        return batch["step_tokens"] if self.group_size is None else batch["step_groups"]

    def terms(self, batch: Mapping[str, Any]) -> int:
        """The number of terms in a micro-batch."""
        if self.group_size is None:
            return int((batch["targets"] >= 0).sum())
        records = batch["records"]
        return len((records[records >= 0] // self.group_size).unique())


OBJECTIVES: dict[str, str] = {
    "cross_entropy": "rwkv_miss.training.objectives.cross_entropy",
}
"""Each objective's name in `TrainConfig.objective`, and the module whose OBJECTIVE it is."""


def find_objective(name: str) -> Objective:
    """The objective of that name, which is in the table."""
    return importlib.import_module(OBJECTIVES[name]).OBJECTIVE
