"""The memory that a run takes of each GPU and of its host, from its settings and the shapes of its base."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from rwkv_miss.adapters.inject import trained_parameters
from rwkv_miss.config import TrainConfig
from rwkv_miss.planning.shapes import Base
from rwkv_miss.planning.step import model_of, step_phases
from rwkv_miss.training.deepspeed_json import read_deepspeed_json

CONTEXT = 0.5 * 2**30
"""Assumed: what CUDA, its kernels and its libraries take of a GPU."""
MARGIN = 0.05
"""Assumed: by how much PyTorch's allocator takes more than the tensors that a step makes, to round and reuse blocks."""
PROCESS = 2 * 2**30
"""Assumed: what Python, PyTorch and CUDA's libraries take of the host's memory in each process."""
CPU_PROCESS, CPU_MARGIN = 0.45 * 2**30, 0.7
"""The same where there is no GPU: glibc's allocator, which keeps much of what is freed, took 62 % to 70 % more."""

# Lightning's defaults for DeepSpeed (DeepSpeedStrategy) and, of the last one, DeepSpeed's own: how many numbers a
# buffer for gradients holds, and how many parameters ZeRO-3 has whole at the same time.
_BUCKET, _LIVE = 200_000_000, 1_000_000_000


class Row(NamedTuple):
    """A part of the memory, in bytes: of each GPU, and of each machine's own memory."""

    name: str
    device: float
    host: float = 0


@dataclass(frozen=True)
class Memory:
    """What a run takes at the peak of a step, part by part. On a machine without a GPU `device` is the memory of each
    process. trained: the number of trained parameters."""

    rows: list[Row]
    trained: int

    @property
    def device(self) -> float:
        return sum(row.device for row in self.rows)

    @property
    def tensors(self) -> float:
        """What PyTorch's tensors take of `device`, without what is assumed."""
        return sum(row.device for row in self.rows if "(assumed" not in row.name)

    @property
    def host(self) -> float:
        return sum(row.host for row in self.rows)


@dataclass(frozen=True)
class _Sizes:
    """Bytes of the frozen weights, of the trained parameters, of their optimizer's state and of the file."""

    frozen: int
    trained: int
    file: int


def memory(base: Base, config: TrainConfig) -> Memory:
    """The memory at the phase of a step that takes the most.

    Raises:
        UserError: a setting does not fit the base.
    """
    model = model_of(base, config)
    trained = trained_parameters(model)
    chosen = {id(p) for p in trained.values()}
    frozen = [x for x in (*model.parameters(), *model.buffers()) if id(x) not in chosen]
    sizes = _Sizes(_bytes(frozen), _bytes(trained.values()), _bytes(base.tensors.values()))
    stage = int(config.strategy[-1]) if config.strategy.startswith("deepspeed") else 0
    ranks = config.devices * config.num_nodes
    accumulates = config.accumulate > 1 or bool(config.window_len and config.window_len < config.ctx_len)
    in_buckets = stage == 0 and (ranks > 1 or config.strategy == "ddp")
    phases = step_phases(base, config, keeps_gradients=stage == 0 and (accumulates or in_buckets))
    found = []
    for phase, held in phases.items():
        if stage:
            rows = _with_zero(sizes, held, phase, config, stage, ranks, accumulates)
        else:
            gradients = sizes.trained if in_buckets else held["gradients"]
            rows = [
                Row("weights, frozen", sizes.frozen),
                Row("weights, trained (fp32)", sizes.trained),
                Row("optimizer state", held["optimizer state"]),
                Row("gradients", gradients),
            ]
        found.append([*rows, Row("activations", held["activations"]), Row("logits", held["logits"])])
    rows = max(found, key=lambda rows: sum(row.device for row in rows))
    rows += _assumed(config, sum(row.device for row in rows[-3:]))
    rows += _host(base, config, sizes, sum(row.host for row in rows))
    return Memory(rows, sum(p.numel() for p in trained.values()))


def _with_zero(
    sizes: _Sizes, held: dict[str, float], phase: str, config: TrainConfig, stage: int, ranks: int, accumulates: bool
) -> list[Row]:
    """What DeepSpeed (0.19: runtime/zero/stage_1_and_2.py, stage3.py) keeps where. Its optimizer works on copies of the
    trained parameters, of which each rank has a share; stage 2 also shares the gradients, stage 3 all weights.
    Gradients go through buffers that are there, in their full size, during the backward pass (in stage 3 always)."""
    zero = read_deepspeed_json(config).get("zero_optimization", {})
    offloads, all_weights = config.offload != "none", config.offload == "all"

    def on(host: bool, size: float) -> tuple[float, float]:
        return (0, config.devices * size) if host else (size, 0)

    share = sizes.trained / ranks
    copies = 2 if stage < 3 and zero.get("overlap_comm", True) else 1
    buffers = zero.get("reduce_bucket_size", min(_BUCKET, sizes.trained // 4)) * 4 * copies
    backward = phase not in ("forward", "optimizer")
    if phase == "optimizer":
        held["activations"] = 0 if offloads else held["activations"] / ranks
        gradients = 0 if offloads else share * (2 if stage < 3 else 1)
    else:
        gradients = 0 if offloads else sizes.trained if stage == 1 else share
        gradients *= backward or accumulates or stage == 3
    frozen = sizes.frozen / ranks if stage == 3 else sizes.frozen
    trained = share if stage == 3 else sizes.trained
    rows = [
        Row("weights, frozen", *on(all_weights, frozen)),
        Row("weights, trained (fp32)", *on(all_weights, trained)),
    ]
    if stage == 3 and (ranks > 1 or all_weights):
        each = (sizes.frozen + sizes.trained) * min(1, zero.get("stage3_max_live_parameters", _LIVE) / _count(sizes))
        rows.append(Row("weights, gathered (at most)", each))
    rows += [
        Row("optimizer's copy of the trained weights", *on(offloads, share)),
        Row("optimizer state", *on(offloads, held["optimizer state"] / ranks)),
        Row(
            "DeepSpeed's buffers",
            buffers if backward or stage == 3 else 0,
            config.devices * 2 * share if offloads else 0,
        ),
        Row("gradients", gradients),
    ]
    return rows


def _count(sizes: _Sizes) -> float:
    """About how many parameters there are; frozen ones are taken to be in bf16."""
    return sizes.frozen / 2 + sizes.trained / 4


def _assumed(config: TrainConfig, of_step: float) -> list[Row]:
    on_cpu = config.wkv_backend == "cpu"
    name, process, margin = ("Python, PyTorch", CPU_PROCESS, CPU_MARGIN) if on_cpu else ("CUDA", CONTEXT, MARGIN)
    return [Row(f"{name} (assumed)", process), Row(f"allocator (assumed {margin:.0%})", margin * of_step)]


def _host(base: Base, config: TrainConfig, sizes: _Sizes, offloaded: float) -> list[Row]:
    """The rows of the host beside what is `offloaded` to it, which comes after the loading."""
    if config.wkv_backend == "cpu":
        return []
    is_cast = any(x.dtype != base.dtype for x in base.tensors.values())
    loading = config.devices * (sizes.trained + sizes.frozen * is_cast)
    return [
        Row("the base's file, mapped (given back where memory is short)", 0, sizes.file),
        Row("what is loaded, on its way to the GPU", 0, max(0, loading - offloaded)),
        Row("Python, PyTorch, CUDA (assumed 2 GiB a process)", 0, config.devices * PROCESS),
    ]


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(x.nbytes for x in tensors)
