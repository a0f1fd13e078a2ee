"""What a checkpoint must hold so that a run can go on from it: all that is trained, and the state of the
optimizer, the schedule and Lightning's loops."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rwkv_miss.errors import UserError


def check_complete(
    checkpoint: Mapping[str, Any], held: Mapping[str, Tensor], in_optimizer: Sequence[Tensor], path: str | Path
) -> None:
    """Checks a checkpoint that Lightning wrote (DeepSpeed checks its own) before anything is taken from it: what it
    lacks would begin anew in silence.

    Args:
        held: what the run's results depend on beyond the frozen base, by its names in the checkpoint.
        in_optimizer: the trained parameters among them, in the optimizer's order.

    Raises:
        UserError: a part is missing, of another shape, or not finite.
    """

    def refuse(what: str) -> UserError:
        return UserError(f"{path}: {what}; the checkpoint is damaged: start anew with --overwrite true")

    found = checkpoint["state_dict"]
    if not isinstance(found, dict):
        raise refuse("state_dict holds no tensors")
    if unknown := found.keys() - held.keys():
        raise refuse(f"has {min(map(str, unknown))}, which this run does not train")
    for name, tensor in held.items():
        if problem := _problem(found.get(name), tensor):
            raise refuse(f"{name} {problem}")
    try:
        [optimizer], [schedule] = checkpoint["optimizer_states"], checkpoint["lr_schedulers"]
        states = [optimizer["state"][i] for i in range(len(in_optimizer))]
        moments = [state[name] for state in states for name in ("exp_avg", "exp_avg_sq")]
        steps = [float(state["step"]) for state in states] + [float(schedule["last_epoch"])]
        counts = [*_leaves(checkpoint["loops"]["fit_loop"]["state_dict"]), *_leaves(checkpoint["loops"])]
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError):
        raise refuse("the state of the optimizer, the schedule or the loops is not whole") from None
    if not all(isinstance(count, int) and count >= 0 for count in counts):
        raise refuse("the counts of the loops are no numbers")
    for moment, parameter in zip(moments, (p for p in in_optimizer for _ in range(2)), strict=True):
        if problem := _problem(moment, parameter):
            raise refuse(f"a moment of the optimizer {problem}")
    if not all(1 <= step < float("inf") for step in steps):
        raise refuse("the optimizer or the schedule has counted no steps")


def _leaves(content: Any) -> Iterator[Any]:
    """What is in dicts and lists of dicts and lists."""
    if not isinstance(content, (dict, list)):
        yield content
        return
    for part in content.values() if isinstance(content, dict) else content:
        yield from _leaves(part)


def _problem(found: Any, parameter: Tensor) -> str | None:
    if not isinstance(found, Tensor):
        return "is missing"
    if found.is_nested or found.layout != torch.strided or found.device.type == "meta":
        return "is not dense"
    if found.shape != parameter.shape or found.dtype != parameter.dtype:
        kinds = [f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}" for x in (found, parameter)]
        return f"is {kinds[0]}, expected {kinds[1]}"
    return None if torch.isfinite(found).all() else "is not finite"
