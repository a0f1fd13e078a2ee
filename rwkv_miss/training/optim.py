"""The optimizer and the learning rate's schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from rwkv_miss.config import TrainConfig


def lr_scale(step: int, total: int, config: TrainConfig) -> float:
    """The learning rate of optimizer step `step` (from 0, of `total`) as a share of the peak.

    Linear warm-up over warmup_steps; then constant, a half cosine down to lr_min, or wsd (constant, then linear
    down to lr_min over the last decay_share of all steps; MiniCPM, arXiv 2404.06395).
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    start = config.warmup_steps if config.schedule == "cosine" else total - round(total * config.decay_share)
    start = max(start, config.warmup_steps)
    done = min(max(step - start, 0) / max(total - start, 1), 1.0)
    fall = (1 - math.cos(math.pi * done)) / 2 if config.schedule == "cosine" else done
    return 1 - (1 - config.lr_min) * fall


def configure(parameters: Iterable[nn.Parameter], total_steps: int, config: TrainConfig) -> tuple[AdamW, LambdaLR]:
    """AdamW over the trainable parameters, and its schedule, stepped once per optimizer step."""
    trainable = [p for p in parameters if p.requires_grad]
    optimizer = AdamW(trainable, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay)
    return optimizer, LambdaLR(optimizer, lambda step: lr_scale(step, total_steps, config))
