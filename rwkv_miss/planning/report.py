"""What `rwkv-miss plan` says."""

from __future__ import annotations

from dataclasses import dataclass, field

from rwkv_miss.config import PlanConfig
from rwkv_miss.errors import UserError
from rwkv_miss.planning.fit import changes, largest_batch, parse_bytes
from rwkv_miss.planning.memory import Row, memory
from rwkv_miss.planning.shapes import find_base
from rwkv_miss.training.checks import setting_problems
from rwkv_miss.training.objective import OBJECTIVES
from rwkv_miss.training.prepare import with_adapters_settings


@dataclass
class Planned:
    """rows: what takes how many bytes of each GPU and of each machine; device, host: their sums. batch_size: the
    largest that fits, 0 if none does, None if no GPU's memory was given. lines: the same in words, and what to change.
    """

    title: str
    trained: int
    rows: list[Row]
    device: float
    host: float
    batch_size: int | None = None
    lines: list[str] = field(default_factory=list)


def plan(config: PlanConfig) -> Planned:
    """The memory of a run, and what fits into `config.gpu_memory`.

    Raises:
        UserError: a setting is wrong, or the base cannot be read.
    """
    found = setting_problems(config)
    if config.objective not in OBJECTIVES:
        found.append(f"objective is {config.objective!r}; there are {', '.join(OBJECTIVES)}")
    if found:
        raise UserError("; ".join(found))
    config = with_adapters_settings(config)
    limit = parse_bytes(config.gpu_memory) if config.gpu_memory else None
    base = find_base(config)
    needed = memory(base, config)
    name = f"RWKV-{config.version} {config.shape}" if config.shape else config.base
    title = f"{name}, {needed.trained:,} trained"
    result = Planned(title, needed.trained, needed.rows, needed.device, needed.host)
    result.lines.append("taken as the longest: every row full, every token with loss, one document in a row")
    if limit is None:
        return result
    result.batch_size = largest_batch(base, config, limit)
    rows = config.batch_size * config.accumulate
    if result.batch_size >= config.batch_size:
        result.lines.append(f"fits into {config.gpu_memory}; the largest batch_size that does is {result.batch_size}")
    elif result.batch_size:
        batch = max(n for n in range(1, result.batch_size + 1) if rows % n == 0)
        result.lines.append(
            f"does not fit into {config.gpu_memory}: the largest batch_size that does is {result.batch_size}; "
            f"--batch_size {batch} --accumulate {rows // batch} has the same rows in a step"
        )
    else:
        result.lines.append(
            f"does not fit into {config.gpu_memory} with any batch_size; each of these with those above:"
        )
        last = needed
        for change, last in changes(config, limit):
            result.lines.append(f"  {change}: {last.device / 2**30:,.2f} GiB, host {last.host / 2**30:,.2f} GiB")
        if last.device > limit:
            result.lines.append("that is still too much: take more GPUs or a smaller model")
    return result
