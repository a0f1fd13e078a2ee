"""How a run is going: a progress bar (or lines, where the output is no terminal), metrics.csv, TensorBoard."""

from __future__ import annotations

import csv
import time
from pathlib import Path
from typing import Any

import lightning as L
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from rwkv_miss.files import atomic_write
from rwkv_miss.training.optim import lr_scale

_COLUMNS = ("step", "epoch", "tokens", "loss", "val_loss", "lr", "tokens_per_s", "seconds")


class Reporter(L.Callback):
    """One row every `every` optimizer steps and one for each validation. `tokens` counts the positions of all
    rows so far, on every rank; `seconds` are those of this process. Rank 0 writes."""

    def __init__(self, out: Path, every: int, total_steps: int, console: Console) -> None:
        self.out, self.every, self.total_steps, self.console = out, every, total_steps, console
        self.base_val_loss: float | None = None
        self.last_loss: float | None = None
        self._tokens = self._tokens_at_row = 0
        self._csv = self._board = self._bar = None

    def state_dict(self) -> dict[str, Any]:
        return {"tokens": self._tokens, "base_val_loss": self.base_val_loss}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._tokens = self._tokens_at_row = state_dict["tokens"]
        self.base_val_loss = state_dict["base_val_loss"]

    def setup(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        self._start = self._row_time = time.monotonic()

    def on_sanity_check_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.base_val_loss = module.val_loss

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        step = trainer.global_step
        self._first_step, self._train_time = step, time.monotonic()
        self._row_time = self._train_time
        if not trainer.is_global_zero:
            return
        path = self.out / "metrics.csv"
        rows = []
        if path.exists():  # resumed: what came after the checkpoint is about to be done again
            with path.open(newline="") as f:
                rows = [row for row in csv.DictReader(f) if int(row["step"]) <= step]
        with atomic_write(path) as part, part.open("w", newline="") as f:
            writer = csv.DictWriter(f, _COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
        self._csv = path.open("a", newline="")
        self._board = SummaryWriter(self.out / "tensorboard", purge_step=step + 1)
        if self.console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[figures]}"),
                TimeElapsedColumn(),
                TextColumn("ETA"),
                TimeRemainingColumn(),
                console=self.console,
            )
            self._task = self._bar.add_task("training", total=self.total_steps, completed=step, figures="")
            self._bar.start()
        if self.base_val_loss is not None and step == 0:
            self._row(trainer, {"val_loss": self.base_val_loss})

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: dict[str, Any], batch_idx: int
    ) -> None:
        self._tokens += batch["positions"]
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        step = trainer.global_step
        if self._bar:
            self._bar.update(self._task, completed=step)
        if step % self.every and step != self.total_steps and step != 1:
            return
        self.last_loss = float(trainer.strategy.reduce(module.step_loss, reduce_op="sum"))
        now = time.monotonic()
        rate = (self._tokens - self._tokens_at_row) / max(now - self._row_time, 1e-9)
        self._tokens_at_row, self._row_time = self._tokens, now
        lr = module.config.lr * lr_scale(step - 1, self.total_steps, module.config)  # of the step just taken
        self._row(trainer, {"loss": self.last_loss, "lr": lr, "tokens_per_s": rate})

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._row(trainer, {"val_loss": module.val_loss})
        self._row_time = time.monotonic()

    def teardown(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        if self._bar:
            self._bar.stop()
        if self._csv:
            self._csv.close()
        if self._board:
            self._board.close()

    def on_exception(self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, module, "fit")  # which Lightning leaves out then: the bar would hide the cursor for good

    def _row(self, trainer: L.Trainer, figures: dict[str, float]) -> None:
        if not trainer.is_global_zero:
            return
        step, seconds = trainer.global_step, time.monotonic() - self._start
        row = {"step": step, "epoch": trainer.current_epoch, "tokens": self._tokens, **figures}
        csv.DictWriter(self._csv, _COLUMNS).writerow(
            {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} | {"seconds": f"{seconds:.1f}"}
        )
        self._csv.flush()
        for name, value in figures.items():
            self._board.add_scalar(name, value, step)
        if "val_loss" in figures:
            self.console.print(f"step {step}: validation loss {figures['val_loss']:.4f}")
        elif self._bar:
            text = f"loss {figures['loss']:.4f}  {figures['tokens_per_s']:,.0f} tokens/s"
            self._bar.update(self._task, figures=text)
        else:
            a_step = (time.monotonic() - self._train_time) / (step - self._first_step)
            self.console.print(
                f"step {step}/{self.total_steps}  loss {figures['loss']:.4f}  lr {figures['lr']:.2e}  "
                f"{figures['tokens_per_s']:,.0f} tokens/s  ETA {(self.total_steps - step) * a_step:.0f} s",
                highlight=False,
                soft_wrap=True,
            )
