"""How processes share the work: one alone, DDP, or DeepSpeed ZeRO 1 to 3, on GPUs and on a CPU."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from lightning.pytorch.plugins.precision import DeepSpeedPrecision
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, ParallelStrategy, Strategy
from torch import Tensor, nn

from rwkv_miss.config import TrainConfig
from rwkv_miss.errors import UserError


class _KeepDtypes(DeepSpeedPrecision):
    """The frozen weights stay in the base's dtype beside an fp32 adapter; Lightning's would make all fp32."""

    def __init__(self) -> None:
        super().__init__("32-true")

    def convert_module(self, module: nn.Module) -> nn.Module:
        return module


class _CPUDeepSpeed(DeepSpeedStrategy):
    """DeepSpeed on the CPU over gloo. DeepSpeed supports it; Lightning's strategy refuses (2.6.6)."""

    def setup_environment(self) -> None:
        # Past DeepSpeedStrategy, whose only addition is the check for CUDA.
        super(DeepSpeedStrategy, self).setup_environment()

    @property
    def root_device(self) -> torch.device:
        return torch.device("cpu", self.local_rank)  # DeepSpeed wants an index


def build(config: TrainConfig, on_gpu: bool) -> tuple[Strategy | str, list[Any]]:
    """Lightning's `strategy` and `plugins` arguments for the run.

    Raises:
        UserError: DeepSpeed was asked for and is not installed.
    """
    name = config.strategy
    several = config.devices * config.num_nodes > 1
    if name == "auto":
        name = "ddp" if several else "single"
    if name == "single":
        return "auto", []
    if name == "ddp":
        # static: the adapter's parameters all take part in every step, in the same order.
        return DDPStrategy(process_group_backend="nccl" if on_gpu else "gloo", gradient_as_bucket_view=True), []
    if not on_gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed's own switch, read when it is imported
    try:
        import deepspeed  # noqa: F401
    except ImportError as e:
        raise UserError(f"strategy is {name} but deepspeed cannot be imported ({e}); install it or use ddp") from None
    cls = DeepSpeedStrategy if on_gpu else _CPUDeepSpeed
    strategy = cls(
        stage=int(name[-1]),
        exclude_frozen_parameters=True,
        process_group_backend="nccl" if on_gpu else "gloo",
        logging_level=40,
    )
    return strategy, [_KeepDtypes()]


def is_deepspeed(strategy: Strategy) -> bool:
    return isinstance(strategy, DeepSpeedStrategy)


def gathered(strategy: Strategy, parameters: Iterable[Tensor]) -> AbstractContextManager:
    """A context in which the parameters are whole on every rank; ZeRO-3 keeps them in shards otherwise."""
    if isinstance(strategy, DeepSpeedStrategy) and strategy.zero_stage_3:
        import deepspeed

        return deepspeed.zero.GatheredParameters(list(parameters))
    return nullcontext()


def is_several(strategy: Strategy) -> bool:
    return isinstance(strategy, ParallelStrategy) and strategy.world_size > 1
