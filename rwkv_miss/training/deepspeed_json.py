"""A user's DeepSpeed settings. Importing this imports no torch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rwkv_miss.config import TrainConfig
from rwkv_miss.errors import UserError
from rwkv_miss.files import check_is_file

# DeepSpeed's settings that ours decide, and which of ours.
_DECIDED = {
    "train_batch_size": "batch_size, accumulate and devices",
    "train_micro_batch_size_per_gpu": "batch_size",
    "gradient_accumulation_steps": "accumulate",
    "gradient_clipping": "grad_clip",
    "optimizer": "lr, betas and weight_decay",
    "scheduler": "schedule, warmup_steps and lr_min",
    "fp16": "precision",
    "bf16": "precision",
    "amp": "precision",
    "zero_allow_untested_optimizer": "strategy",
    "zero_optimization.stage": "strategy",
    "zero_optimization.offload_optimizer.device": "offload",
    "zero_optimization.offload_param.device": "offload",
}


def read_deepspeed_json(config: TrainConfig) -> dict[str, Any]:
    """The settings in the file `config.deepspeed_config`, without those that are "auto", which are left to ours.

    Raises:
        UserError: the file cannot be read, or one of its settings says something else than ours.
    """
    if config.deepspeed_config is None:
        return {}
    path = Path(config.deepspeed_config)
    check_is_file(path, "DeepSpeed settings")
    try:
        found = json.loads(path.read_text())
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path}: not a JSON file: {e}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: holds a {type(found).__name__}; expected DeepSpeed's settings by name")
    found = _without_auto(found)
    agreed = {
        "zero_optimization.stage": int(config.strategy[-1]),
        "zero_optimization.offload_optimizer.device": "none" if config.offload == "none" else "cpu",
        "zero_optimization.offload_param.device": "cpu" if config.offload == "all" else "none",
    }
    for name, value in _flat(found):
        decided = next((key for key in _DECIDED if name == key or name.startswith(f"{key}.")), None)
        if decided and agreed.get(decided) != value:
            raise UserError(
                f"{path}: {name} is {json.dumps(value)}, which {_DECIDED[decided]} of rwkv-miss decide"
                f'{"s" if " " not in _DECIDED[decided] else ""}; remove it there, or make it "auto"'
            )
    return found


def merged(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """`ours` with what `theirs` says beside it or instead."""
    both = dict(ours)
    for name, value in theirs.items():
        before = ours.get(name)
        both[name] = merged(before, value) if isinstance(before, dict) and isinstance(value, dict) else value
    return both


def _without_auto(settings: dict[str, Any]) -> dict[str, Any]:
    kept = {name: _without_auto(value) if isinstance(value, dict) else value for name, value in settings.items()}
    return {name: value for name, value in kept.items() if value not in ("auto", {})}


def _flat(settings: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values by their names, such as zero_optimization.stage."""
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
