"""DeepSpeed ZeRO 1 to 3, on GPUs and on a CPU."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.precision import DeepSpeedPrecision
from lightning.pytorch.strategies import DeepSpeedStrategy, Strategy
from torch import Tensor, nn
from torch.optim import Optimizer

from rwkv_miss.checkpoint import unpickle_checkpoint, write_pickle
from rwkv_miss.config import TrainConfig
from rwkv_miss.errors import RunError, UserError
from rwkv_miss.files import cache_folder, locked
from rwkv_miss.training.deepspeed_json import merged, read_deepspeed_json
from rwkv_miss.training.together import Together

_log = logging.getLogger("rwkv_miss")


class KeepDtypes(DeepSpeedPrecision):
    """Keeps the frozen weights in the base's dtype beside fp32 trained ones; Lightning's own would make all fp32."""

    def __init__(self) -> None:
        super().__init__("32-true")

    def convert_module(self, module: nn.Module) -> nn.Module:
        return module

    def backward(self, tensor: Tensor, model: Any, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        # Lightning has divided by the number of accumulated micro-batches; DeepSpeed would divide again, and
        # clip a gradient that is too small by that factor.
        super().backward(tensor, model, optimizer, *args, scale_wrt_gas=False, **kwargs)


def unpickle_zero(path: Path) -> Any:
    """What DeepSpeed has written to a file of a checkpoint."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return unpickle_checkpoint(path, [LossScaler, ZeroStageEnum, fragment_address])


def _deepspeed_files() -> Any:
    """How DeepSpeed's engine writes and reads its files: to their own place alone, and without running anything."""
    from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine

    class Files(TorchCheckpointEngine):
        def save(self, state_dict: Any, path: str) -> None:
            write_pickle(Path(path), state_dict)

        def load(self, path: str, map_location: Any = None) -> Any:
            return unpickle_zero(Path(path))

    return Files()


class _DeepSpeed(Together, DeepSpeedStrategy):
    """DeepSpeed, watched, with files that are written and read as ours are.

    fits_buffers: make the buffers that gradients go through no larger than all gradients, of which an adapter has few.
    """

    fits_buffers = True

    def _setup_model_and_optimizer(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        from pydantic import ValidationError

        # Every rank has read the frozen weights from the same file. DeepSpeed would write rank 0's over them, which
        # gives each process on a CPU a copy of the mapped file. It leaves out parameters with this mark (stage 3 does
        # not, whose shards are copies anyway).
        for p in model.parameters():
            if not p.requires_grad:
                setattr(p, "ds_optim_param", True)  # noqa: B010 (the type has no such attribute)
        if self.fits_buffers:
            assert isinstance(self.config, dict)
            zero = self.config["zero_optimization"]
            trained = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad)
            zero["reduce_bucket_size"] = min(zero["reduce_bucket_size"], trained)
        try:
            engine, optimizer = super()._setup_model_and_optimizer(model, *args, **kwargs)
        except ValidationError as e:
            [error, *_] = e.errors()
            name = ".".join(map(str, error["loc"]))
            raise UserError(
                f"deepspeed_config: DeepSpeed refuses {name} = {error['input']!r}: {error['msg']}"
            ) from None
        engine.checkpoint_engine = _deepspeed_files()
        return engine, optimizer


class _CPUDeepSpeed(_DeepSpeed):
    """DeepSpeed on the CPU over gloo. DeepSpeed supports it; Lightning's strategy refuses (2.6.6)."""

    def setup_environment(self) -> None:
        assert self.parallel_devices is not None
        self.parallel_devices = [torch.device("cpu", i) for i in range(len(self.parallel_devices))]  # it needs indices
        super(DeepSpeedStrategy, self).setup_environment()  # past the check for CUDA, which is all that was added


def make_deepspeed(config: TrainConfig, on_gpu: bool, timeout: timedelta) -> DeepSpeedStrategy:
    """Lightning's strategy for one of the DeepSpeed strategies of `config`.

    Raises:
        UserError: DeepSpeed is not installed, or its settings conflict with ours.
        RunError: what it needs on a CPU is not there.
    """
    settings = read_deepspeed_json(config)
    _import_deepspeed(config, on_gpu)
    strategy = (_DeepSpeed if on_gpu else _CPUDeepSpeed)(
        stage=int(config.strategy[-1]),
        offload_optimizer=config.offload != "none",
        offload_parameters=config.offload == "all",
        exclude_frozen_parameters=True,
        process_group_backend="nccl" if on_gpu else "gloo",
        timeout=timeout,
        logging_level=logging.ERROR,
    )
    strategy.config = merged(strategy.config or {}, settings)
    strategy.fits_buffers = "reduce_bucket_size" not in settings.get("zero_optimization", {})
    return strategy


def cpu_adam() -> type[Optimizer]:
    """AdamW whose state is in the CPU's memory, and which steps there."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    return DeepSpeedCPUAdam


def gathered(strategy: Strategy, parameters: Iterable[Tensor]) -> AbstractContextManager:
    """A context in which the parameters are whole on every rank; ZeRO-3 keeps them in shards otherwise."""
    if isinstance(strategy, DeepSpeedStrategy) and strategy.zero_stage_3:
        import deepspeed

        return deepspeed.zero.GatheredParameters(list(parameters))
    return nullcontext()


def _import_deepspeed(config: TrainConfig, on_gpu: bool) -> None:
    if not on_gpu:
        # With this variable, which some launchers set, the processes share memory, of which a container may have too
        # little. DeepSpeed (0.19) uses it for inference alone.
        os.environ.pop("LOCAL_SIZE", None)
        os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed's own switch, read when it is imported
    try:
        import deepspeed  # noqa: F401
    except ImportError as e:
        raise UserError(
            f"strategy is {config.strategy} but deepspeed cannot be imported ({e}); install it or use ddp"
        ) from None
    if not on_gpu:
        _load_op("ShareMemCommBuilder", "communication between processes on a CPU")
    if config.offload != "none":
        _load_op("CPUAdamBuilder", "Adam on a CPU")


def _load_op(builder_name: str, what: str) -> None:
    """Compiles and loads an op of DeepSpeed's, before DeepSpeed asks for it.

    DeepSpeed leaves that to PyTorch, which marks a running build by a file. If the build is killed, the file stays and
    every later process waits for ever for it to go. Here one process at a time builds or loads the op, under a lock
    that ends with the process, in a folder that no other program builds in: a file found there is a dead process's.

    Args:
        what: what the op is for, for messages.

    Raises:
        RunError: it cannot be compiled.
    """
    from deepspeed.accelerator import get_accelerator

    builder = get_accelerator().create_op_builder(builder_name)
    if builder is None or not builder.is_compatible(verbose=False):
        return
    folder = cache_folder() / "deepspeed" / torch.__version__
    with locked(folder / "build.lock"):
        (folder / builder.name / "lock").unlink(missing_ok=True)
        if not list(folder.glob(f"{builder.name}/*.so")):
            _log.info("compiling DeepSpeed's %s (once, about half a minute)", what)
        before = os.environ.get("TORCH_EXTENSIONS_DIR")
        os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)  # read by PyTorch when it builds
        try:
            builder.load(verbose=False)
        except Exception as e:  # PyTorch raises what the compiler, the linker or the import say
            raise RunError(f"DeepSpeed's {what} cannot be compiled ({e}); use --strategy ddp") from None
        finally:
            del os.environ["TORCH_EXTENSIONS_DIR"]
            if before is not None:
                os.environ["TORCH_EXTENSIONS_DIR"] = before
