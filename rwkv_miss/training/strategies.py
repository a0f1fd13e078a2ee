"""How processes share the work: one alone, DDP, or DeepSpeed ZeRO 1 to 3, on GPUs and on a CPU."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.environments import ClusterEnvironment, SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import DDPStrategy, Strategy

from rwkv_miss.checkpoint import unpickle_checkpoint, write_pickle
from rwkv_miss.config import TrainConfig
from rwkv_miss.training.together import Together
from rwkv_miss.training.watch import Watch
from rwkv_miss.training.zero import KeepDtypes, make_deepspeed


class _Beside(TorchCheckpointIO):
    """Writes a checkpoint to its own place alone, where Lightning's own goes by way of the folder for temporary files,
    and runs nothing that it reads."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        write_pickle(Path(path), checkpoint)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        return unpickle_checkpoint(Path(path))


class _DDP(Together, DDPStrategy):
    """DDP, watched."""


def build(config: TrainConfig, on_gpu: bool, watch: Watch) -> tuple[Strategy | str, list[Any]]:
    """Lightning's `strategy` and `plugins` arguments for the run, whose processes `watch` looks after.

    Raises:
        UserError, RunError: as `make_deepspeed`.
    """
    several = config.devices * config.num_nodes > 1
    if config.strategy == "auto" and not several:
        return "auto", [Precision(), _Beside(), *_environments()]
    timeout = timedelta(minutes=2 * config.hang_minutes)  # the watch, which knows more, comes first
    strategy: Any
    plugins: list[Any]
    if config.strategy in ("auto", "ddp"):
        # init_sync: every rank has built the same model, from the same file and seed. DDP would write rank 0's weights
        # over it, which gives each process on a CPU a copy of the mapped file. broadcast_buffers: quantised weights are
        # buffers, which DDP would send anew before each forward pass.
        settings: dict[str, Any] = {"gradient_as_bucket_view": True, "init_sync": False, "broadcast_buffers": False}
        strategy = _DDP(process_group_backend="nccl" if on_gpu else "gloo", timeout=timeout, **settings)
        plugins = [Precision(), _Beside()]
    else:
        strategy, plugins = make_deepspeed(config, on_gpu, timeout), [KeepDtypes()]
    plugins += _environments()
    strategy.watch = watch
    # On one machine a process that cannot come has ended, which is seen at once.
    strategy.meet_minutes = config.meet_minutes if config.num_nodes > 1 else config.hang_minutes
    return strategy, plugins


def _environments() -> list[ClusterEnvironment]:
    """The launcher, where Lightning does not recognise it or takes more upon itself than is asked."""
    if "CROSS_RANK" in os.environ:
        # DeepSpeed's launcher sets the variables that torchrun does, but not the one by which torchrun is known.
        return [TorchElasticEnvironment()]
    if SLURMEnvironment.detect() and not TorchElasticEnvironment.detect():
        # Lightning's own requeuing would save a checkpoint of its own, beside those of the run.
        return [SLURMEnvironment(auto_requeue=False)]
    return []
