"""The training and validation steps."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from rwkv_miss.config import TrainConfig
from rwkv_miss.errors import UserError
from rwkv_miss.model.loss import loss_sum
from rwkv_miss.model.state import State
from rwkv_miss.training import optim
from rwkv_miss.training.nonfinite import check_finite


class LitRWKV(L.LightningModule):
    """Trains the model's trainable parameters on batches of `rwkv_miss.data.batches`.

    After each optimizer step `step_loss` is this rank's share of the loss averaged over the step's tokens;
    after each validation `val_loss` is the mean over all its tokens, on every rank.
    """

    # Checkpoints hold what is trained alone; the frozen weights come from the base's file.
    strict_loading = False

    def __init__(self, model: nn.Module, config: TrainConfig, total_steps: int) -> None:
        super().__init__()
        self.model, self.config, self.total_steps = model, config, total_steps
        self.step_loss = torch.zeros(())
        self.val_loss: float | None = None
        self._carried: State | None = None  # into the next window of the same rows
        self._val_sums: Tensor | None = None

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer, schedule = optim.configure(self.model.named_parameters(), self.total_steps, self.config)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        before = self._carried
        share = self._loss_sum(batch) / batch["step_tokens"]
        check_finite(self, share, lambda: loss_sum(self.model, batch, before, self.config.chunk_len))
        micro_batches = self.trainer.accumulate_grad_batches
        self.step_loss = share.detach() + (0 if batch_idx % micro_batches == 0 else self.step_loss)
        # Lightning and DeepSpeed divide by micro_batches, and the ranks' gradients are averaged; step_tokens counts
        # the tokens of the whole step, so both are undone and the gradient is that of the mean over its tokens.
        return share * (micro_batches * self.trainer.world_size)

    def on_validation_epoch_start(self) -> None:
        self._val_sums = torch.zeros(2, dtype=torch.float64, device=self.device)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._val_sums[0] += self._loss_sum(batch)
        self._val_sums[1] += (batch["targets"] >= 0).sum()

    def on_validation_epoch_end(self) -> None:
        loss, tokens = self.trainer.strategy.reduce(self._val_sums, reduce_op="sum").tolist()
        self.val_loss = loss / tokens

    def _loss_sum(self, batch: dict[str, Any]) -> Tensor:
        """`loss_sum` of a window, from the state that the window before it left."""
        state, last = self._carried, batch["last"]
        if torch.is_grad_enabled() and not batch["has_loss"] and batch["tokens"].shape[1] > 1:
            # Only the state is wanted, without a gradient. But DDP and DeepSpeed want a backward pass through all
            # parameters in every micro-batch: the last column's is enough.
            with torch.no_grad():
                _, state = loss_sum(self.model, _columns(batch, slice(-1)), state, self.config.chunk_len)
            batch = _columns(batch, slice(-1, None))
        loss, state = loss_sum(self.model, batch, state, self.config.chunk_len)
        self._carried = None if last else state.detach()
        return loss

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        trained = {name for name, p in self.named_parameters() if p.requires_grad}
        if "state_dict" in checkpoint:  # DeepSpeed writes its own
            checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trained}
        checkpoint["base_fingerprint"] = self.model.fingerprint

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        found, here = checkpoint.get("base_fingerprint"), self.model.fingerprint
        if found not in (None, here):  # None: from before it was recorded
            raise UserError(
                f"{self.config.base}: the checkpoint was trained on another base (fingerprint {found[:12]}; this one "
                f"has {here[:12]}); resume with the base that the run began with"
            )


def _columns(batch: dict[str, Any], wanted: slice) -> dict[str, Tensor]:
    return {name: x[:, wanted] for name, x in batch.items() if isinstance(x, Tensor)}
