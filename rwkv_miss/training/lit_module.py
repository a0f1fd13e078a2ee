"""The training and validation steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor

from rwkv_miss.adapters.inject import checkpoint_key, held_tensors
from rwkv_miss.config import TrainConfig
from rwkv_miss.data.sources import data_name
from rwkv_miss.errors import UserError
from rwkv_miss.fingerprints import is_of_base
from rwkv_miss.model.base import RWKV
from rwkv_miss.model.log_probs import batch_log_probs
from rwkv_miss.model.state import State
from rwkv_miss.training import optim
from rwkv_miss.training.nonfinite import check_finite
from rwkv_miss.training.objective import Objective
from rwkv_miss.training.resuming import check_complete


class LitRWKV(L.LightningModule):
    """Trains the model's trainable parameters on batches of `rwkv_miss.data.batches`.

    After each optimizer step `step_loss` is this rank's share of the mean of the objective's terms over the step;
    after each validation `val_loss` is the mean over all of the validation's terms, on every rank.
    """

    # Checkpoints hold only what an adapter holds; the frozen weights come from the base's file.
    strict_loading = False

    def __init__(
        self, model: RWKV, objective: Objective, config: TrainConfig, total_steps: int, data_fingerprint: str
    ) -> None:
        super().__init__()
        self.data_fingerprint = data_fingerprint
        self.model, self.objective, self.config, self.total_steps = model, objective, config, total_steps
        self.step_loss = torch.zeros(())
        self.val_loss: float | None = None
        self.lr_columns: list[str] = []
        self._carried: State | None = None  # into the next window of the same rows
        self._val_sums = torch.zeros(2)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        groups = optim.parameter_groups(self.model, self.config)
        self.lr_columns = optim.lr_columns(groups)
        optimizer, schedule = optim.configure(groups, self.total_steps, self.config)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def learning_rates(self) -> dict[str, float]:
        """The learning rates that the optimizer's next step will use, by the columns of metrics.csv."""
        groups = self.trainer.optimizers[0].param_groups
        return {column: group["lr"] for column, group in zip(self.lr_columns, groups, strict=True)}

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        if self.config.adapter.dropout:
            self._seed_dropout(batch_idx)
        before = self._carried
        share = self._loss_sum(batch) / self.objective.terms_of_step(batch)
        check_finite(self.trainer, self.model, share, lambda: self._log_probs(batch, before))
        micro_batches = self.trainer.accumulate_grad_batches
        self.step_loss = share.detach() + (0 if batch_idx % micro_batches == 0 else self.step_loss)
        # Lightning and DeepSpeed divide by micro_batches, and the ranks' gradients are averaged. `share` has already
        # been divided by the terms of the whole step, so both divisions are undone here.
        return share * (micro_batches * self.trainer.world_size)

    def _seed_dropout(self, batch_idx: int) -> None:
        """What is dropped depends on the seed, the micro-batch and the rank alone, so that a resumed run drops the same
        as one without a stop."""
        trainer = self.trainer
        place = trainer.global_step, batch_idx % trainer.accumulate_grad_batches, trainer.global_rank
        torch.manual_seed(int(np.random.SeedSequence([self.config.seed, *place]).generate_state(1, np.uint64)[0]))

    def on_validation_epoch_start(self) -> None:
        self._val_sums = torch.zeros(2, dtype=torch.float64, device=self.device)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._val_sums[0] += self._loss_sum(batch)
        self._val_sums[1] += self.objective.terms(batch)

    def on_validation_epoch_end(self) -> None:
        loss, terms = self.trainer.strategy.reduce(self._val_sums, reduce_op="sum").tolist()
        self.val_loss = loss / terms

    def predict_step(self, work: Callable[[], None]) -> None:
        """Does `work`. By `trainer.strategy.predict_step` it is a forward pass of the strategy's own: only in one does
        ZeRO-3 gather weights."""
        work()

    def _loss_sum(self, batch: dict[str, Any]) -> Tensor:
        """The sum of the objective's terms in a window, from the state that the window before it left."""
        state, last = self._carried, batch["last"]
        if torch.is_grad_enabled() and not batch["has_loss"] and batch["tokens"].shape[1] > 1:
            # Only the state is needed, without a gradient. But DDP and DeepSpeed need a backward pass through all
            # parameters in every micro-batch: one through the last column is enough.
            with torch.no_grad():
                _, state = self._log_probs(_columns(batch, slice(-1)), state)
            batch = batch | _columns(batch, slice(-1, None))
        log_probs, state = self._log_probs(batch, state)
        self._carried = None if last else state.detach()
        return self.objective.loss_sum(log_probs, batch)

    def _log_probs(self, batch: dict[str, Any], state: State | None) -> tuple[Tensor, State]:
        reduction: Literal["sum", "none"] = "sum" if self.objective.group_size is None else "none"
        return batch_log_probs(self.model, batch, state, self.config.chunk_len, reduction)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if "state_dict" in checkpoint:  # DeepSpeed writes its own
            held = self._held()
            checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in held}
        checkpoint["base_fingerprint"] = self.model.fingerprint
        checkpoint["data_fingerprint"] = self.data_fingerprint

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.check_checkpoint(checkpoint, self.trainer.ckpt_path or "")

    def check_checkpoint(self, checkpoint: dict[str, Any], path: str | Path) -> None:
        """UserError unless the run can go on from the checkpoint, which is in `path`."""
        found, here = checkpoint.get("base_fingerprint"), self.model.fingerprint
        if found is not None and not is_of_base(found, here):  # None: from before it was recorded
            raise UserError(
                f"{self.config.base}: the checkpoint was trained on another base (fingerprint {str(found)[:12]}; this "
                f"one has {here[:12]}); resume with the base that the run began with"
            )
        if checkpoint.get("data_fingerprint") not in (None, self.data_fingerprint):
            data = data_name(self.config.data)
            raise UserError(
                f"{data}: the checkpoint was trained on other data, on what other settings made of it, or by another "
                "version; resume with the data that the run began with, or start anew with another out"
            )
        if "state_dict" in checkpoint:  # DeepSpeed reads its own
            in_optimizer = [
                p for group in optim.parameter_groups(self.model, self.config).values() for p in group.values()
            ]
            check_complete(checkpoint, self._held(), in_optimizer, path)

    def _held(self) -> dict[str, Tensor]:
        """The tensors that a checkpoint holds, by their names in it."""
        keys = held_tensors(self.model).keys()
        return {name: t for name, t in self.state_dict().items() if checkpoint_key(name.removeprefix("model.")) in keys}


def _columns(batch: dict[str, Any], wanted: slice) -> dict[str, Tensor]:
    return {name: x[:, wanted] for name, x in batch.items() if isinstance(x, Tensor)}
