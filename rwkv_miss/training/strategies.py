"""How processes share the work: one alone, DDP, or DeepSpeed ZeRO 1 to 3, on GPUs and on a CPU."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from lightning.pytorch.plugins.precision import DeepSpeedPrecision
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, Strategy
from torch import Tensor, nn

from rwkv_miss.config import TrainConfig
from rwkv_miss.errors import UserError


class _KeepDtypes(DeepSpeedPrecision):
    """The frozen weights stay in the base's dtype beside fp32 trained ones; Lightning's would make all fp32."""

    def __init__(self) -> None:
        super().__init__("32-true")

    def convert_module(self, module: nn.Module) -> nn.Module:
        return module

    def backward(self, tensor: Tensor, model: Any, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        # Lightning has divided by the number of accumulated micro-batches; DeepSpeed would do it again, and
        # clip a gradient that is that much too small.
        super().backward(tensor, model, optimizer, *args, scale_wrt_gas=False, **kwargs)


class _CPUDeepSpeed(DeepSpeedStrategy):
    """DeepSpeed on the CPU over gloo. DeepSpeed supports it; Lightning's strategy refuses (2.6.6)."""

    def setup_environment(self) -> None:
        assert self.parallel_devices is not None
        self.parallel_devices = [torch.device("cpu", i) for i in range(len(self.parallel_devices))]  # it wants indices
        super(DeepSpeedStrategy, self).setup_environment()  # past the check for CUDA, which is all that was added


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


def gathered(strategy: Strategy, parameters: Iterable[Tensor]) -> AbstractContextManager:
    """A context in which the parameters are whole on every rank; ZeRO-3 keeps them in shards otherwise."""
    if isinstance(strategy, DeepSpeedStrategy) and strategy.zero_stage_3:
        import deepspeed

        return deepspeed.zero.GatheredParameters(list(parameters))
    return nullcontext()
