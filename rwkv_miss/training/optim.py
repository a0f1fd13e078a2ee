"""The optimizer and the learning rate's schedule."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from rwkv_miss.adapters.inject import installed, trained_parameters
from rwkv_miss.adapters.method import Group
from rwkv_miss.config import TrainConfig
from rwkv_miss.model.base import RWKV


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


def parameter_groups(model: RWKV, config: TrainConfig) -> dict[Group, dict[str, nn.Parameter]]:
    """The trained parameters by the group that their method puts them into (`Method.group`) and by key, in the model's
    order."""
    plan = installed(model).plan
    groups: dict[Group, dict[str, nn.Parameter]] = {}
    for key, parameter in trained_parameters(model).items():
        group = plan.method_of(key).group(key, parameter, type(model), config)
        groups.setdefault(group, {})[key] = parameter
    return groups


def configure(
    groups: Mapping[Group, Mapping[str, nn.Parameter]], total_steps: int, config: TrainConfig
) -> tuple[Optimizer, LambdaLR]:
    """AdamW over the groups of `parameter_groups`, in their order, and its schedule, which is stepped once in each
    optimizer step. With offload it is DeepSpeed's, which steps on the CPU."""
    settings: list[dict[str, Any]] = [
        {"params": list(parameters.values()), "lr": group.lr, "weight_decay": group.weight_decay}
        for group, parameters in groups.items()
    ]
    kind: type[Optimizer] = AdamW
    if config.offload != "none":
        from rwkv_miss.training.zero import cpu_adam

        kind = cpu_adam()
    optimizer = kind(settings, betas=config.betas)  # type: ignore[call-arg]
    return optimizer, LambdaLR(optimizer, lambda step: lr_scale(step, total_steps, config))


def lr_columns(groups: Mapping[Group, Any]) -> list[str]:
    """The column of each group's learning rate in a run's metrics, in the groups' order: `lr` for the run's own rate,
    `lr_{name}` for others. Groups of the same name share a column. If no group has the run's own rate, the first
    group's column is `lr`."""
    names = [group.name for group in groups]
    first = "" if "" in names else names[0]
    return ["lr" if name == first else f"lr_{name}" for name in names]
