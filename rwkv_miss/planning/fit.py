"""The largest batch that fits into a GPU, and what to change where none does."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import torch

from rwkv_miss.config import PlanConfig
from rwkv_miss.errors import UserError
from rwkv_miss.planning.memory import Memory, memory
from rwkv_miss.planning.shapes import Base, find_base

_UNITS = {"": 2**30, "gb": 2**30, "gib": 2**30, "g": 2**30, "mb": 2**20, "mib": 2**20, "m": 2**20}


def parse_bytes(text: str) -> float:
    """24GB -> 24 * 2^30 bytes, since a GPU's name gives its memory so.

    Raises:
        UserError: the text is not a size above 0.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text.lower())
    if not found or found[2] not in _UNITS or not float(found[1]):
        raise UserError(f"gpu_memory is {text!r}; give a size such as 24GB")
    return float(found[1]) * _UNITS[found[2]]


def largest_batch(base: Base, config: PlanConfig, limit: float) -> int:
    """The largest `batch_size` with which a GPU of `limit` bytes suffices; 0 if none does."""

    def takes(batch: int) -> float:
        return memory(base, replace(config, batch_size=batch)).device

    if (of_least := takes(1)) > limit:
        return 0
    least, most, guess, tried = 1, 2**30, 2, 1
    while most - least > 1:
        found = takes(guess)
        each = max((found - of_least) / (guess - least), 1)
        if found <= limit:
            least, of_least = guess, found
        else:
            most = guess
        tried += 1
        # Beyond a few rows the memory is on a line, which soon leads there; where it does not, halving does.
        guess = least + int((limit - of_least) // each) if tried < 8 else (least + most) // 2
        guess = min(max(guess, least + 1), 64 * least, most - 1)
    return least


def changes(config: PlanConfig, limit: float) -> Iterator[tuple[str, Memory]]:
    """What to change where not even one row fits, in the order of what it costs in speed: each change, with those
    before it, lowers the memory, and the last makes it fit, if any does. Yields each as text, and the memory with it.
    """
    config = replace(config, batch_size=1, accumulate=config.batch_size * config.accumulate)
    least = memory(find_base(config), config)
    yield f"batch_size 1, accumulate {config.accumulate}", least
    for change in _CHANGES:
        if least.device <= limit:
            return
        if not (settings := change(config)):
            continue
        changed = replace(config, **settings)
        found = memory(find_base(changed), changed)
        if found.device < least.device:
            config, least = changed, found
            yield ", ".join(f"{name} {_value(value)}" for name, value in settings.items()), found


def _value(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _checkpointing(config: PlanConfig) -> dict[str, Any]:
    return {} if config.gradient_checkpointing else {"gradient_checkpointing": True}


def _bf16(config: PlanConfig) -> dict[str, Any]:
    return {"precision": "bf16"} if find_base(config).dtype != torch.bfloat16 else {}


def _chunks(config: PlanConfig) -> dict[str, Any]:
    return {"chunk_len": 512} if config.ctx_len > 512 and (config.chunk_len or 513) > 512 else {}


def _stage_2(config: PlanConfig) -> dict[str, Any]:
    several = config.devices * config.num_nodes > 1
    return {"strategy": "deepspeed_stage_2"} if several and config.strategy in ("auto", "ddp") else {}


def _stage_3(config: PlanConfig) -> dict[str, Any]:
    several = config.devices * config.num_nodes > 1
    return {"strategy": "deepspeed_stage_3"} if several and config.strategy != "deepspeed_stage_3" else {}


def _offload_optimizer(config: PlanConfig) -> dict[str, Any]:
    if config.offload != "none":
        return {}
    strategy = config.strategy if config.strategy.startswith("deepspeed") else "deepspeed_stage_2"
    return {"strategy": strategy, "offload": "optimizer"}


def _int8(config: PlanConfig) -> dict[str, Any]:
    return {"quant": "int8"} if config.quant == "none" and _can_quantise(config) else {}


def _nf4(config: PlanConfig) -> dict[str, Any]:
    return {"quant": "nf4"} if config.quant != "nf4" and _can_quantise(config) else {}


def _can_quantise(config: PlanConfig) -> bool:
    is_trained = "full" in config.adapter.method.split("+")
    return not is_trained and config.offload != "all" and find_spec("bitsandbytes") is not None


def _offload_all(config: PlanConfig) -> dict[str, Any]:
    if config.offload == "all" or config.quant != "none":
        return {}
    return {"strategy": "deepspeed_stage_3", "offload": "all"}


_CHANGES: list[Callable[[PlanConfig], dict[str, Any]]] = [
    _bf16,
    _checkpointing,
    _chunks,
    _stage_2,
    _stage_3,
    _offload_optimizer,
    _int8,
    _nf4,
    _offload_all,
]
"""The settings that each change makes; none where it would change nothing."""
