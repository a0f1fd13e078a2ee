"""What DDP and DeepSpeed have in common here: how the processes of a run are started, meet, and are watched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.fabric.plugins.environments import ClusterEnvironment
from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher

from rwkv_miss.errors import RunError
from rwkv_miss.training.meeting import meet
from rwkv_miss.training.parent import announce_parent
from rwkv_miss.training.watch import Watch


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


class Together:
    """A part of a strategy of Lightning's: its processes meet before the process group is made, and are watched from
    then on."""

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
