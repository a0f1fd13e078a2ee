"""The start of a run on several machines: waits until all processes are there, or ends and says which are missing."""

from __future__ import annotations

import time
from datetime import timedelta

import torch.distributed as dist
from lightning.fabric.plugins.environments import ClusterEnvironment

from rwkv_miss.errors import RunError


class Meeting:
    """Where the processes of a run wait for each other before torch's process group is made, which would wait without a
    word. It is a TCPStore on MASTER_PORT, and is kept open, so that this process's process group can share the port.
    """

    def __init__(self, num_nodes: int, minutes: float) -> None:
        self._num_nodes, self._minutes = num_nodes, minutes
        self._store: dist.TCPStore | None = None

    def attend(self, environment: ClusterEnvironment) -> None:
        """Returns once every rank has called it.

        Args:
            environment: knows this process's rank, and where the first one is.

        Raises:
            RunError: some have not come in time, or the first cannot be reached.
        """
        rank, world_size = environment.global_rank(), environment.world_size()
        address = f"{environment.main_address}:{environment.main_port}"
        deadline = time.monotonic() + 60 * self._minutes
        try:
            self._store = dist.TCPStore(
                environment.main_address,
                environment.main_port,
                world_size,
                is_master=rank == 0,
                timeout=timedelta(minutes=self._minutes),
                wait_for_workers=False,
                multi_tenant=True,
            )
            self._store.set(_key(rank), "")
            missing = list(range(world_size))
            while missing := [other for other in missing if not self._store.check([_key(other)])]:
                if time.monotonic() > deadline:
                    break
                time.sleep(0.1)
        except (RuntimeError, OSError) as e:
            raise RunError(
                f"rank {rank} of {world_size} cannot reach the first process at {address} (MASTER_ADDR, MASTER_PORT) "
                f"within {self._minutes:g} minutes: start the run on the machine of NODE_RANK 0 too, and see that no "
                f"firewall is between ({str(e).splitlines()[0]})"
            ) from None
        if missing:
            processes = world_size // self._num_nodes
            nodes = sorted({other // processes for other in missing})
            raise RunError(
                f"after {self._minutes:g} minutes {len(missing)} of {world_size} processes have not come to {address}: "
                f"rank {', '.join(map(str, missing))}, of NODE_RANK {', '.join(map(str, nodes))}; start the same "
                "command there, with the same MASTER_ADDR and MASTER_PORT, or raise meet_minutes"
            )


def _key(rank: int) -> str:
    return f"rwkv_miss/here/{rank}"
