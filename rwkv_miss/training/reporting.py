"""Takes a run's figures and gives them to its loggers and its display."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import DeepSpeedStrategy

from rwkv_miss.training.lit_module import LitRWKV
from rwkv_miss.training.loggers import ALWAYS, LOGGERS
from rwkv_miss.training.progress import TrainingDisplay


class Reporter(L.Callback):
    """One report every `every` optimizer steps, at the first and the last, and one for each validation.

    `tokens` counts the documents' tokens in the rows of all ranks so far; `positions` counts the rows' padding too.
    `tokens_per_s` and `positions_per_s` are averages since the last report. `grad_norm` is the norm of the step's
    gradient over all trained parameters, before it is clipped. `memory_mb` is the most memory so far, in 10^6 bytes, of
    the rank that has used most: what tensors took of a GPU, or the whole process on a CPU. `seconds` counts from when
    this process began to train.
    """

    def __init__(
        self,
        module: LitRWKV,
        out: Path,
        loggers: list[str],
        every: int,
        total_steps: int,
        display: TrainingDisplay,
    ) -> None:
        self.module = module
        self.out, self.every, self.total_steps, self.display = out, every, total_steps, display
        self.loggers = dict.fromkeys([*ALWAYS, *loggers])
        self.base_val_loss: float | None = None
        self.first_loss: float | None = None
        self.last_loss: float | None = None
        self._tokens = self._positions = 0
        self._at_report = (0, 0)
        self._grad_norm = 0.0

    def state_dict(self) -> dict[str, Any]:
        return {
            "tokens": self._tokens,
            "positions": self._positions,
            "base_val_loss": self.base_val_loss,
            "first_loss": self.first_loss,
            "last_loss": self.last_loss,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._tokens = state_dict["tokens"]
        # Runs from before the two were told apart counted positions as tokens, and kept no first loss.
        self._positions = state_dict.get("positions", self._tokens)
        self._at_report = self._tokens, self._positions
        self.base_val_loss = state_dict["base_val_loss"]
        self.first_loss = state_dict.get("first_loss")
        self.last_loss = state_dict.get("last_loss")

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._start = self._report_time = time.monotonic()

    def on_sanity_check_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.base_val_loss = self.module.val_loss

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        rates = list(dict.fromkeys(self.module.lr_columns))
        columns = ["epoch", "tokens", "positions", "loss", "val_loss", *rates]
        columns += ["grad_norm", "tokens_per_s", "positions_per_s", "memory_mb", "seconds"]
        # Not earlier: a logger writes to the run's folder, and all checks have to come before.
        # The cast is safe: Lightning's Logger adds to Fabric's only what Lightning's own checkpoints use.
        trainer.loggers = [cast(Logger, LOGGERS[name](self.out, columns, trainer.global_step)) for name in self.loggers]
        if trainer.is_global_zero:
            self.display.start(trainer.global_step)
        if self.base_val_loss is not None and trainer.global_step == 0:
            self._report(trainer, {"val_loss": self.base_val_loss})
        self._report_time = time.monotonic()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # The rates of the current step: after its last micro-batch the schedule has gone on to the next.
        self._rates = self.module.learning_rates()

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        # DeepSpeed calls this after every micro-batch, when the gradients of its shards are its own affair.
        if self._is_reported(trainer.global_step + 1) and not isinstance(trainer.strategy, DeepSpeedStrategy):
            gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            self._grad_norm = float(torch.nn.utils.get_total_norm(gradients))

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: dict[str, Any], batch_idx: int
    ) -> None:
        self._tokens += batch["filled"]
        self._positions += batch["positions"]
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        step = trainer.global_step
        self.display.step(step)
        if not self._is_reported(step):
            return
        if isinstance(trainer.strategy, DeepSpeedStrategy):
            self._grad_norm = float(trainer.strategy.deepspeed_engine.get_global_grad_norm())
        self.last_loss = float(trainer.strategy.reduce(self.module.step_loss, reduce_op="sum"))
        if self.first_loss is None:
            self.first_loss = self.last_loss
        now = time.monotonic()
        seconds = max(now - self._report_time, 1e-9)
        tokens, positions = self._tokens - self._at_report[0], self._positions - self._at_report[1]
        speeds = {"tokens_per_s": tokens / seconds, "positions_per_s": positions / seconds}
        memory = torch.tensor(peak_memory(self.module.device) / 1e6, device=self.module.device)
        used = {"grad_norm": self._grad_norm, "memory_mb": float(trainer.strategy.reduce(memory, reduce_op="max"))}
        self._at_report, self._report_time = (self._tokens, self._positions), now
        self._report(trainer, {"loss": self.last_loss, **self._rates, **speeds, **used})

    def leave_out(self, seconds: float) -> None:
        """These seconds, which have just gone by, were not spent on training."""
        self._report_time += seconds

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._validation_start = time.monotonic()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            assert self.module.val_loss is not None
            self._report(trainer, {"val_loss": self.module.val_loss})
        self.leave_out(time.monotonic() - self._validation_start)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.display.stop()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self.display.stop()  # Lightning skips `teardown` then, and the bar would hide the cursor for good

    def _is_reported(self, step: int) -> bool:
        return step % self.every == 0 or step in (1, self.total_steps)

    def _report(self, trainer: L.Trainer, figures: dict[str, float]) -> None:
        step = trainer.global_step
        counts = {"epoch": trainer.current_epoch, "tokens": self._tokens, "positions": self._positions}
        row = {**counts, **figures, "seconds": round(time.monotonic() - self._start, 1)}
        for logger in trainer.loggers:
            logger.log_metrics(row, step)
        if trainer.is_global_zero:
            self.display.report(step, figures)


def peak_memory(device: torch.device) -> int:
    """The most bytes so far that this process's tensors took of a GPU; on a CPU, that the process had in memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # not on Windows

    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
