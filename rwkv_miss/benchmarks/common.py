"""What the benchmarks share: turns, threads, processes, bases, and other programs' files where they are installed."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

from rwkv_miss.checkpoint import TensorSpec, write_pth
from rwkv_miss.errors import RunError
from rwkv_miss.model.init import new_config
from rwkv_miss.model.recognise import parameter_shapes


class Table(NamedTuple):
    """What a benchmark found: for each thing that was measured a row, a dict of column names and values."""

    title: str
    rows: list[dict[str, Any]]


def by_turns(
    ways: Mapping[str, Callable[[], object]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """The seconds that each of `ways` takes in each of `rounds`, after one that warms up. They take turns, so that
    a busy machine slows all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for i in range(rounds + 1):
        for name, work in ways.items():
            start = clock()
            work()
            if i > 0:
                seconds[name].append(clock() - start)
    return seconds


def ratios(name: str, above: Sequence[float], below: Sequence[float]) -> dict[str, float]:
    """The columns `name`, with the median of the rounds' ratios, and `name`_min and `name`_max."""
    found = sorted(a / b for a, b in zip(above, below, strict=True))
    return {name: statistics.median(found), f"{name}_min": found[0], f"{name}_max": found[-1]}


def apart(function: Callable, *arguments: Any) -> Any:
    """What the function returns in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def installed_file(package: str, path: str) -> Path | None:
    """A file of an installed package, which need not be importable; None where it is not there."""
    try:
        file = Path(str(importlib.metadata.distribution(package).locate_file(path)))
    except importlib.metadata.PackageNotFoundError:
        return None
    return file if file.exists() else None


def load_file(path: Path) -> ModuleType:
    """A Python file as a module, without the package that it is in."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_random_base(path: Path, n_layer: int, n_embd: int) -> None:
    """Writes an RWKV-7 of random weights in bf16, with the World vocabulary."""
    shapes = parameter_shapes(new_config(7, n_layer, n_embd, 65536))
    rng = torch.Generator().manual_seed(0)
    write_pth(
        path,
        {key: TensorSpec(shape, torch.bfloat16) for key, shape in shapes.items()},
        lambda key: torch.empty(shapes[key], dtype=torch.bfloat16).uniform_(-0.05, 0.05, generator=rng),
    )


@contextmanager
def threads(count: int) -> Iterator[None]:
    """PyTorch has this many threads in the context."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def resident(name: str) -> int:
    """A figure of this process's memory in bytes (Linux: proc_pid_status(5))."""
    [line] = [x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(f"{name}:")]
    return int(line.split()[1]) * 1024


def peak_bytes(work: Callable[[], object]) -> int:
    """The bytes that `work` takes at its peak beyond what was held before: of the GPU's memory that PyTorch has
    allocated if there is a GPU, otherwise of this process's resident memory.

    Raises:
        RunError: the system does not say a process's peak memory.
    """
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts afresh: proc_pid_clear_refs(5)
    except OSError as e:
        raise RunError(f"bench: this system does not say a process's peak memory ({e})") from e
    before = resident("VmRSS")
    work()
    return resident("VmHWM") - before
