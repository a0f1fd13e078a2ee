"""Training on two machines: two network namespaces, each with an address, a loopback and a cache of its own, joined by
one cable. They share the output folder."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import pytest

from rwkv_miss.config import TrainConfig
from rwkv_miss.files import cache_folder
from tests.processes import finish
from tests.training.runs import adapter, as_arguments, losses, quiet_train

pytestmark = pytest.mark.slow
# Variables by which a launcher around the tests would be taken for that of the run.
LAUNCHER = re.compile(r"(MASTER|NODE|LOCAL|GROUP)_\w+|RANK|WORLD_SIZE|TORCHELASTIC_\w+|SLURM_\w+|OMPI_\w+")
CABLE = "cable"


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@dataclass(frozen=True)
class Host:
    """A network namespace, which has the interface `CABLE` with this address."""

    name: str
    address: str
    cache: Path
    start_process: Callable[..., subprocess.Popen]

    def start(self, command: list[str], **environment: str) -> subprocess.Popen:
        """Starts a command on this host."""
        kept = {name: value for name, value in os.environ.items() if not LAUNCHER.fullmatch(name)}
        own = {"XDG_CACHE_HOME": str(self.cache), "GLOO_SOCKET_IFNAME": CABLE}
        return self.start_process(["ip", "netns", "exec", self.name, *command], env=kept | own | environment)

    def cable(self, state: str) -> None:
        """Plugs the cable in or out: up or down."""
        ip("-n", self.name, "link", "set", CABLE, state)


@pytest.fixture
def hosts(tmp_path, start_process) -> Iterator[list[Host]]:
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("two network namespaces need root and the command ip (iproute2)")
    hosts = [
        Host(f"rwkv_miss-{os.getpid()}-{n}", f"10.200.0.{n + 1}", tmp_path / f"cache{n}", start_process) for n in (0, 1)
    ]
    try:
        for host in hosts:
            ip("netns", "add", host.name)
            # Compiled code is that of this machine; everything else in the cache is the host's own.
            (host.cache / "rwkv_miss").mkdir(parents=True)
            (cache_folder() / "deepspeed").mkdir(parents=True, exist_ok=True)
            for path in cache_folder().iterdir():
                if path.name != "data":
                    (host.cache / "rwkv_miss" / path.name).symlink_to(path)
        first, second = (host.name for host in hosts)
        ip("link", "add", CABLE, "netns", first, "type", "veth", "peer", "name", CABLE, "netns", second)
        for host in hosts:
            ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", CABLE)
            ip("-n", host.name, "link", "set", "lo", "up")
            host.cable("up")
        yield hosts
    finally:
        for host in hosts:
            subprocess.run(["ip", "netns", "delete", host.name], capture_output=True)


def plain(host: Host, number: int, config: TrainConfig, first: Host) -> subprocess.Popen:
    meeting = {"MASTER_ADDR": first.address, "MASTER_PORT": "29500", "NODE_RANK": str(number)}
    return host.start([sys.executable, "-m", "rwkv_miss", "train", *as_arguments(config)], **meeting)


def torchrun(host: Host, number: int, config: TrainConfig, first: Host) -> subprocess.Popen:
    options = {
        "--nnodes": "2",
        "--nproc-per-node": "1",
        "--rdzv-backend": "c10d",
        "--rdzv-endpoint": f"{first.address}:29500",
        # Both hosts have the name of this machine, by which torchrun would find out where it is.
        "--rdzv-conf": f"is_host={host is first:d}",
        "--local-addr": host.address,
    }
    launcher = [sys.executable, "-m", "torch.distributed.run", *chain(*options.items())]
    return host.start([*launcher, "-m", "rwkv_miss", "train", *as_arguments(config)])


def deepspeed(host: Host, number: int, config: TrainConfig, first: Host) -> subprocess.Popen:
    """What `deepspeed --hostfile` runs on each host, by ssh."""
    hostfile = base64.urlsafe_b64encode(json.dumps({"first": [0], "second": [0]}).encode()).decode()
    options = [
        f"--world_info={hostfile}",
        f"--node_rank={number}",
        f"--master_addr={first.address}",
        "--master_port=29500",
        "--module",
        "--no_local_rank",
    ]
    launcher = [sys.executable, "-m", "deepspeed.launcher.launch", *options]
    return host.start([*launcher, "rwkv_miss", "train", *as_arguments(config)], DS_ACCELERATOR="cpu")


def slurm(host: Host, number: int, config: TrainConfig, first: Host) -> subprocess.Popen:
    """The variables that srun sets, and that Lightning reads."""
    told = {
        "SLURM_JOB_ID": "12345",
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "1",
        "SLURM_NNODES": "2",
        "SLURM_NODELIST": first.address,
        "SLURM_NODEID": str(number),
        "SLURM_PROCID": str(number),
        "SLURM_LOCALID": "0",
    }
    return host.start([sys.executable, "-m", "rwkv_miss", "train", *as_arguments(config)], **told)


@pytest.mark.parametrize("launch", [torchrun, deepspeed, slurm])
def test_two_hosts_give_the_run_of_one(make_config, hosts, tmp_path, launch):
    one = make_config(max_steps=3)
    quiet_train(one)
    two = replace(one, out=str(tmp_path / "two"), num_nodes=2, batch_size=4, strategy="deepspeed_stage_2")
    processes = [launch(host, number, two, hosts[0]) for number, host in enumerate(hosts)]
    printed = finish(*processes)
    assert losses(two.out) == pytest.approx(losses(one.out), rel=1e-5)
    assert "3 steps done" in printed[0] and "steps done" not in printed[1]
    assert adapter(two.out).keys() == adapter(one.out).keys()


def test_a_cut_cable_ends_both_and_the_run_goes_on(make_config, hosts, tmp_path):
    """The losses before the cut and after it are those of one process."""
    one = make_config(max_steps=60)
    quiet_train(one)
    two = replace(one, out=str(tmp_path / "two"), num_nodes=2, batch_size=4, strategy="deepspeed_stage_2", save_every=5)
    processes = [plain(host, number, two, hosts[0]) for number, host in enumerate(hosts)]
    metrics = Path(two.out) / "metrics.csv"
    begun_at = time.monotonic()
    while not (metrics.exists() and metrics.read_text().count("\n") > 12):
        assert all(process.poll() is None for process in processes) and time.monotonic() < begun_at + 120
        time.sleep(0.02)
    hosts[1].cable("down")
    cut_at = time.monotonic()
    said = [process.communicate(timeout=max(0, cut_at + 90 - time.monotonic()))[1] for process in processes]
    assert [process.returncode for process in processes] == [1, 1], said
    assert not any("Traceback" in errors for errors in said), said
    for errors, silent in zip(said, ("rank 1", "(rank 0|first process)"), strict=True):
        [line] = [line for line in errors.splitlines() if line.startswith("rwkv-miss train:")]
        assert re.search(silent, line)
    assert len(losses(two.out)) < 60

    hosts[1].cable("up")
    finish(*(plain(host, n, replace(two, resume="auto"), hosts[0]) for n, host in enumerate(hosts)))
    assert losses(two.out) == pytest.approx(losses(one.out), rel=1e-5)
