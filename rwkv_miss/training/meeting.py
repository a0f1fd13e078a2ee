"""The start of a run of several processes: waits until all are there, or ends and says which are missing."""

from __future__ import annotations

import os
import time
from datetime import timedelta

import torch.distributed as dist
from lightning.fabric.plugins.environments import ClusterEnvironment

from rwkv_miss.errors import RunError


def meet(environment: ClusterEnvironment, num_nodes: int, minutes: float) -> dist.Store:
    """Returns once every rank has called it: before torch's process group is made, which would wait without a word.

    Args:
        environment: knows this process's rank, and where the first one is.
        minutes: how long to wait.

    Returns:
        A store that all ranks share, on MASTER_PORT. Torch's process group can have that port too, as long as the
        store is there.

    Raises:
        RunError: some have not come in time, or the first cannot be reached.
    """
    rank, world_size = environment.global_rank(), environment.world_size()
    address = f"{environment.main_address}:{environment.main_port}"
    deadline = time.monotonic() + 60 * minutes
    has_store = "TORCHELASTIC_RUN_ID" in os.environ  # torchrun has opened one on that port
    try:
        store = dist.PrefixStore(
            f"rwkv_miss/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}",
            dist.TCPStore(
                environment.main_address,
                environment.main_port,
                world_size,
                is_master=rank == 0 and not has_store,
                timeout=timedelta(minutes=minutes),
                wait_for_workers=False,
                multi_tenant=True,
            ),
        )
        store.set(_key(rank), "")
        missing = list(range(world_size))
        while missing := [other for other in missing if not store.check([_key(other)])]:
            if time.monotonic() > deadline:
                break
            time.sleep(0.1)
    except (RuntimeError, OSError) as e:
        reason = str(e).splitlines()[0]
        if "EADDRINUSE" in str(e):
            raise RunError(
                f"MASTER_PORT {environment.main_port} is in use on this machine by another program; give another port"
            ) from None
        raise RunError(
            f"rank {rank} of {world_size} cannot reach the first process at {address} (MASTER_ADDR, MASTER_PORT) "
            f"within {minutes:g} minutes: start the run on the machine of NODE_RANK 0 too, and see that no firewall is "
            f"between ({reason})"
        ) from None
    if missing:
        processes = world_size // num_nodes
        nodes = sorted({other // processes for other in missing})
        raise RunError(
            f"after {minutes:g} minutes {len(missing)} of {world_size} processes have not come to {address}: "
            f"rank {', '.join(map(str, missing))}, of NODE_RANK {', '.join(map(str, nodes))}; start the same "
            "command there, with the same MASTER_ADDR and MASTER_PORT, or raise meet_minutes"
        )
    return store


def _key(rank: int) -> str:
    return f"here/{rank}"
