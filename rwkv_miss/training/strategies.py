"""How processes share the work: one alone, DDP, or DeepSpeed ZeRO 1 to 3, on GPUs and on a CPU."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.environments import ClusterEnvironment
from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.plugins.precision import DeepSpeedPrecision, Precision
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, Strategy
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from torch import Tensor, nn

from rwkv_miss.checkpoint import unpickle, write_pickle
from rwkv_miss.config import TrainConfig
from rwkv_miss.errors import RunError, UserError
from rwkv_miss.files import cache_folder, locked
from rwkv_miss.training.meeting import meet
from rwkv_miss.training.parent import announce_parent
from rwkv_miss.training.watch import Watch

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


class _Launcher(_SubprocessScriptLauncher):
    """Starts the other processes of this machine and has them watched. Lightning's own would kill this process too when
    one of them ends, before it could say why."""

    def __init__(self, environment: ClusterEnvironment, num_processes: int, num_nodes: int, watch: Watch) -> None:
        super().__init__(environment, num_processes, num_nodes)
        self.watch = watch

    def launch(self, function: Callable, *args: Any, trainer: Any = None, **kwargs: Any) -> Any:
        self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        if not self.cluster_environment.creates_processes_externally:
            announce_parent()
            try:
                self._call_children_scripts()
            except OSError as e:
                raise RunError(f"the other processes of the run cannot be started: {e}") from None
            self.watch.look_after(self.procs)
        _set_num_threads_if_needed(num_processes=self.num_processes)
        return function(*args, **kwargs)


class _Together:
    """What DDP and DeepSpeed have in common here: their processes meet before the process group is made, and are
    watched from then on."""

    watch: Watch
    meet_minutes: float
    _launcher: Any

    def _configure_launcher(self: Any) -> None:
        self._launcher = _Launcher(self.cluster_environment, self.num_processes, self.num_nodes, self.watch)

    def setup_distributed(self: Any) -> None:
        self.set_world_ranks()
        store = meet(self.cluster_environment, self.num_nodes, self.meet_minutes)
        self.watch.join(store, self.global_rank, self.world_size, self.local_rank)
        super().setup_distributed()  # type: ignore[misc]


class _DDP(_Together, DDPStrategy):
    """DDP, watched."""


class _DeepSpeed(_Together, DeepSpeedStrategy):
    """DeepSpeed, watched."""


class _CPUDeepSpeed(_DeepSpeed):
    """DeepSpeed on the CPU over gloo. DeepSpeed supports it; Lightning's strategy refuses (2.6.6)."""

    def setup_environment(self) -> None:
        assert self.parallel_devices is not None
        self.parallel_devices = [torch.device("cpu", i) for i in range(len(self.parallel_devices))]  # it needs indices
        super(DeepSpeedStrategy, self).setup_environment()  # past the check for CUDA, which is all that was added


def build(config: TrainConfig, on_gpu: bool, watch: Watch) -> tuple[Strategy | str, list[Any]]:
    """Lightning's `strategy` and `plugins` arguments for the run, whose processes `watch` looks after.

    Raises:
        UserError: DeepSpeed was asked for and is not installed.
    """
    several = config.devices * config.num_nodes > 1
    if config.strategy == "auto" and not several:
        return "auto", [Precision(), _Beside()]
    name = "ddp" if config.strategy == "auto" else config.strategy
    backend = "nccl" if on_gpu else "gloo"
    timeout = timedelta(minutes=2 * config.hang_minutes)  # the watch, which knows more, comes first
    strategy: _DDP | _DeepSpeed
    plugins: list[Any]
    if name == "ddp":
        strategy = _DDP(process_group_backend=backend, gradient_as_bucket_view=True, timeout=timeout)
        plugins = [Precision(), _Beside()]
    else:
        _import_deepspeed(name, on_gpu)
        cls = _DeepSpeed if on_gpu else _CPUDeepSpeed
        strategy = cls(
            stage=int(name[-1]),
            exclude_frozen_parameters=True,
            process_group_backend=backend,
            timeout=timeout,
            logging_level=40,
        )
        plugins = [_KeepDtypes()]
    strategy.watch = watch
    # On one machine a process that cannot come has ended, which is seen at once.
    strategy.meet_minutes = config.meet_minutes if config.num_nodes > 1 else config.hang_minutes
    return strategy, plugins


def check_checkpoint(path: Path) -> None:
    """UserError if a run's checkpoint is damaged or holds anything that could run code when it is loaded. DeepSpeed
    unpickles its files without a look."""
    if path.is_file():
        unpickle(path)
        return
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    for file in sorted(path.rglob("*.pt")):
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
