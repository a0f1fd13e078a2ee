"""How processes share the work: one alone, DDP, or DeepSpeed ZeRO 1 to 3, on GPUs and on a CPU."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.plugins.precision import DeepSpeedPrecision, Precision
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, Strategy
from torch import Tensor, nn

from rwkv_miss.checkpoint import check_sums, unpickle, write_pickle
from rwkv_miss.config import TrainConfig
from rwkv_miss.errors import RunError, UserError
from rwkv_miss.files import cache_folder, locked
from rwkv_miss.training.meeting import Meeting

_log = logging.getLogger("rwkv_miss")


class _KeepDtypes(DeepSpeedPrecision):
    """Keeps the frozen weights in the base's dtype beside fp32 trained ones; Lightning's own would make all fp32."""

    def __init__(self) -> None:
        super().__init__("32-true")

    def convert_module(self, module: nn.Module) -> nn.Module:
        return module

    def backward(self, tensor: Tensor, model: Any, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        # Lightning has divided by the number of accumulated micro-batches; DeepSpeed would divide again, and
        # clip a gradient that is too small by that factor.
        super().backward(tensor, model, optimizer, *args, scale_wrt_gas=False, **kwargs)


class _Beside(TorchCheckpointIO):
    """Writes a checkpoint to its own place alone. Lightning's own goes by way of the folder for temporary files."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        write_pickle(Path(path), checkpoint)


class _DDP(DDPStrategy):
    """On several machines, all processes meet before the process group is made."""

    meeting: Meeting | None = None

    def setup_distributed(self) -> None:
        _meet(self)
        super().setup_distributed()


class _DeepSpeed(DeepSpeedStrategy):
    """On several machines, all processes meet before the process group is made."""

    meeting: Meeting | None = None

    def setup_distributed(self) -> None:
        _meet(self)
        super().setup_distributed()


def _meet(strategy: _DDP | _DeepSpeed) -> None:
    if strategy.meeting:
        strategy.set_world_ranks()
        assert strategy.cluster_environment is not None
        strategy.meeting.attend(strategy.cluster_environment)


class _CPUDeepSpeed(_DeepSpeed):
    """DeepSpeed on the CPU over gloo. DeepSpeed supports it; Lightning's strategy refuses (2.6.6)."""

    def setup_environment(self) -> None:
        assert self.parallel_devices is not None
        self.parallel_devices = [torch.device("cpu", i) for i in range(len(self.parallel_devices))]  # it needs indices
        super(DeepSpeedStrategy, self).setup_environment()  # past the check for CUDA, which is all that was added


def build(config: TrainConfig, on_gpu: bool) -> tuple[Strategy | str, list[Any]]:
    """Lightning's `strategy` and `plugins` arguments for the run.

    Raises:
        UserError: DeepSpeed was asked for and is not installed.
    """
    several = config.devices * config.num_nodes > 1
    if config.strategy == "auto" and not several:
        return "auto", [Precision(), _Beside()]
    name = "ddp" if config.strategy == "auto" else config.strategy
    backend = "nccl" if on_gpu else "gloo"
    strategy: _DDP | _DeepSpeed
    plugins: list[Any]
    if name == "ddp":
        strategy, plugins = _DDP(process_group_backend=backend, gradient_as_bucket_view=True), [Precision(), _Beside()]
    else:
        _import_deepspeed(name, on_gpu)
        cls = _DeepSpeed if on_gpu else _CPUDeepSpeed
        strategy = cls(
            stage=int(name[-1]), exclude_frozen_parameters=True, process_group_backend=backend, logging_level=40
        )
        plugins = [_KeepDtypes()]
    # torchrun's own rendezvous has its own time limit, and its store is not ours to open.
    if config.num_nodes > 1 and "TORCHELASTIC_RUN_ID" not in os.environ:
        strategy.meeting = Meeting(config.num_nodes, config.meet_minutes)
    return strategy, plugins


def check_checkpoint(path: Path) -> None:
    """UserError if a run's checkpoint is damaged or holds anything that could run code when it is loaded. DeepSpeed
    unpickles its files without a look."""
    if path.is_file():
        check_sums(path)
        unpickle(path)
        return
    if not (files := sorted(path.rglob("*.pt"))):
        raise UserError(f"{path}: there is no checkpoint in it; remove it, or start anew with --overwrite true")
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    for file in files:
        check_sums(file)
        unpickle(file, [LossScaler, ZeroStageEnum, fragment_address])


def _import_deepspeed(strategy: str, on_gpu: bool) -> None:
    if not on_gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed's own switch, read when it is imported
    try:
        import deepspeed  # noqa: F401
    except ImportError as e:
        raise UserError(
            f"strategy is {strategy} but deepspeed cannot be imported ({e}); install it or use ddp"
        ) from None
    if not on_gpu:
        _load_shared_memory_op()


def _load_shared_memory_op() -> None:
    """Compiles and loads the op by which DeepSpeed's processes on a CPU communicate, before DeepSpeed asks for it.

    DeepSpeed leaves that to PyTorch, which marks a running build by a file. If the build is killed, the file stays and
    every later process waits for ever for it to go. Here one process at a time builds or loads the op, under a lock
    that ends with the process, in a folder that no other program builds in: a file found there is a dead process's.

    Raises:
        RunError: it cannot be compiled.
    """
    from deepspeed.accelerator import get_accelerator

    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    if builder is None or not builder.is_compatible(verbose=False):
        return
    folder = cache_folder() / "deepspeed" / torch.__version__
    with locked(folder / "build.lock"):
        (folder / builder.name / "lock").unlink(missing_ok=True)
        if not list(folder.glob(f"{builder.name}/*.so")):
            _log.info("compiling DeepSpeed's communication between processes on a CPU (once, about half a minute)")
        before = os.environ.get("TORCH_EXTENSIONS_DIR")
        os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)  # read by PyTorch when it builds
        try:
            builder.load(verbose=False)
        except Exception as e:  # PyTorch raises what the compiler, the linker or the import say
            raise RunError(
                f"DeepSpeed's communication between processes on a CPU cannot be compiled ({e}); use --strategy ddp"
            ) from None
        finally:
            del os.environ["TORCH_EXTENSIONS_DIR"]
            if before is not None:
                os.environ["TORCH_EXTENSIONS_DIR"] = before


def gathered(strategy: Strategy, parameters: Iterable[Tensor]) -> AbstractContextManager:
    """A context in which the parameters are whole on every rank; ZeRO-3 keeps them in shards otherwise."""
    if isinstance(strategy, DeepSpeedStrategy) and strategy.zero_stage_3:
        import deepspeed

        return deepspeed.zero.GatheredParameters(list(parameters))
    return nullcontext()
