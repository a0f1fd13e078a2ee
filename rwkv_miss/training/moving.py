"""Going on with a run whose work is shared in another way than before: by other processes, by another strategy, or with
the rows of an optimizer step in other micro-batches. A step has the same rows as before, so that it goes on in the same
place of the data and of the schedule."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, LambdaCallback
from torch import Tensor

from rwkv_miss.adapters.files import WEIGHTS, read_adapter, read_facts
from rwkv_miss.adapters.inject import checkpoint_key, held_tensors
from rwkv_miss.checkpoint import unpickle_checkpoint
from rwkv_miss.errors import UserError
from rwkv_miss.training.checks import Resume
from rwkv_miss.training.lit_module import LitRWKV
from rwkv_miss.training.zero import unpickle_zero

_log = logging.getLogger("rwkv_miss")


def restore(trainer: L.Trainer, module: LitRWKV, resume: Resume, newest: Path, steps_an_epoch: int) -> Callback:
    """Restores what a checkpoint holds into a trainer and a module that have not begun.

    Args:
        newest: the folder of the newest adapter, from which comes what DeepSpeed keeps in parts.

    Returns:
        A callback that restores what is made at the beginning: the schedule and, if it can, the optimizer's state.

    Raises:
        UserError: the checkpoint or the adapter cannot be read, is of another base or other data, or the two are not
            of the same step.
    """
    is_zero = resume.path.is_dir()
    saved = _read_zero(resume.path) if is_zero else unpickle_checkpoint(resume.path)
    module.check_checkpoint(saved, resume.path)
    if is_zero:
        if read_facts(newest).get("step") != resume.step:
            raise UserError(
                f"{newest}: not of step {resume.step}, as {resume.path} is, so the run cannot go on with other "
                "processes from there; let it first go on with the same"
            )
        weights = read_adapter(newest).held
    else:
        weights = {checkpoint_key(name.removeprefix("model.")): t for name, t in saved["state_dict"].items()}
    _load(held_tensors(module.model), weights, newest / WEIGHTS if is_zero else resume.path)

    loops = saved["loops"]["fit_loop"]
    [position] = loops["state_dict"]["combined_loader"]
    before, now = position["batches"] // steps_an_epoch, trainer.accumulate_grad_batches
    for count in ("batch", "batches"):
        position[count] = position[count] // before * now
    progress = loops["epoch_loop.batch_progress"]
    for counts in (progress["total"], progress["current"]):
        done = counts["ready"] // before * now
        counts |= {"ready": done, "started": done, "processed": done, "completed": done - 1}
    trainer.fit_loop.load_state_dict(loops)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if callback.state_key in saved["callbacks"]:
            callback.load_state_dict(saved["callbacks"][callback.state_key])

    # DeepSpeed's optimizer state lies in parts, as many as there were processes.
    states = None if is_zero or hasattr(trainer.strategy, "deepspeed_engine") else saved["optimizer_states"]
    lost = "" if states else ": AdamW's moments cannot be restored and begin at 0 again"
    _log.warning("going on from step %d with %s%s", resume.step, resume.changed, lost)

    def begin(trainer: L.Trainer, _: L.LightningModule) -> None:
        optimizer, schedule = trainer.optimizers[0], trainer.lr_scheduler_configs[0].scheduler
        if states:
            optimizer.load_state_dict(states[0])
        schedule.load_state_dict(saved["lr_schedulers"][0])
        for group, lr in zip(optimizer.param_groups, schedule.get_last_lr(), strict=True):
            group["lr"] = lr

    return LambdaCallback(on_train_start=begin)


def _read_zero(folder: Path) -> dict[str, Any]:
    """What Lightning has put into a checkpoint of DeepSpeed's, which every rank's file has."""
    files = sorted(folder.rglob("*mp_rank_00_model_states.pt"))
    if not files:
        raise UserError(f"{folder}: holds no *mp_rank_00_model_states.pt; not a whole checkpoint of DeepSpeed's")
    return unpickle_zero(files[0])


@torch.no_grad()
def _load(held: dict[str, Tensor], weights: dict[str, Tensor], file: Path) -> None:
    for key, tensor in held.items():
        if key not in weights or weights[key].shape != tensor.shape:
            raise UserError(f"{file}: holds no {key} of shape {tuple(tensor.shape)}, which is trained")
        tensor.copy_(weights[key])
