"""The optimizer and the learning rate's schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from rwkv_miss.adapters.full import checkpoint_key
from rwkv_miss.config import TrainConfig
from rwkv_miss.model.initial_state import is_state


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


def parameter_groups(parameters: Iterable[tuple[str, nn.Parameter]], config: TrainConfig) -> list[dict[str, Any]]:
    """AdamW's groups of the trainable parameters, given with their names in the model.

    MiSS's matrices and learned states: lr (or lr_state) and weight_decay as they are. The base's own parameters as
    BlinkDL trains them (RWKV-LM, configure_optimizers in RWKV-v7/train_temp/src/model.py and, for RWKV-6, with
    layerwise_lr in RWKV-v5/src/model.py): twice the lr for the decay's base, weight decay on the matrices named
    .weight alone.
    """
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, p in parameters:
        if not p.requires_grad:
            continue
        key = checkpoint_key(name)
        is_adapter = key.endswith(".miss_block") or is_state(key)
        is_decay_base = key.endswith((".att.w0", ".att.time_decay"))
        is_matrix = key.endswith(".weight") and p.squeeze().ndim >= 2
        lr = config.lr_state if is_state(key) and config.lr_state else config.lr * (1 + is_decay_base)
        decay = config.weight_decay if is_adapter or is_matrix else 0.0
        group = {"params": [], "lr": lr, "weight_decay": decay}
        groups.setdefault((lr, decay), group)["params"].append(p)
    return list(groups.values())


def configure(
    parameters: Iterable[tuple[str, nn.Parameter]], total_steps: int, config: TrainConfig
) -> tuple[AdamW, LambdaLR]:
    """AdamW over the trainable parameters, and its schedule, stepped once per optimizer step."""
    optimizer = AdamW(parameter_groups(parameters, config), betas=config.betas)
    return optimizer, LambdaLR(optimizer, lambda step: lr_scale(step, total_steps, config))
