"""What several test folders use."""

from __future__ import annotations

import os
from pathlib import Path

from torch import Tensor, nn

from rwkv_miss.adapters.miss import MissLinear
from rwkv_miss.model.log_probs import batch_log_probs
from rwkv_miss.model.state import State


def adapters(model: nn.Module) -> dict[str, MissLinear]:
    """The linears with a MiSS adapter by module path, in the model's order."""
    return {name: m for name, m in model.named_modules() if isinstance(m, MissLinear)}


def loss_sum(*arguments, **options) -> tuple[Tensor, State]:
    """The sum of -log p over a batch's targets, and the state after it; arguments as in `batch_log_probs`."""
    log_prob, state = batch_log_probs(*arguments, **options)
    return -log_prob, state


class RunsCode:
    """Unpickled, this makes a folder: the proof that code ran."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)
