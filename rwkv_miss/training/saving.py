"""What a run leaves on the disk: checkpoints to resume from, and the adapter. A crash loses nothing saved."""

from __future__ import annotations

import math
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
import torch

from rwkv_miss.adapters.files import read_facts, save_adapter
from rwkv_miss.adapters.inject import trained_parameters
from rwkv_miss.errors import RunError, Stopped
from rwkv_miss.files import put_in_place, remove
from rwkv_miss.training.checks import written_by_runs
from rwkv_miss.training.lit_module import LitRWKV
from rwkv_miss.training.strategies import gathered

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
"""The signals that end a run after a checkpoint: Ctrl-C, a plain kill, a closed terminal, and what clusters send before
they take a machine back."""


class Saver(L.Callback):
    """Saves a checkpoint every `every` optimizer steps (0: at each epoch's last), when `minutes` have gone by since the
    last one (0: no limit), after the last step, and on `SIGNALS`.

    The adapter folder holds the best of the validations so far, or the newest where nothing validates. Only the
    newest checkpoint is kept; it is written beside the last and renamed before the last is removed. Checkpoints
    are taken in `on_train_batch_end` alone: there Lightning's counts and the stream's position agree. Later hooks of
    an epoch that is stopped in its middle would count it as a whole one.
    """

    def __init__(
        self,
        module: LitRWKV,
        out: Path,
        every: int,
        minutes: float,
        total_steps: int,
        validates: bool,
        extra: dict[str, Any],
    ) -> None:
        self.module = module
        self.out, self.every, self.minutes, self.total_steps = out, every, minutes, total_steps
        self.validates, self.extra = validates, extra
        self.best: float | None = None
        self.best_step = 0
        self._signal: int | None = None
        self._handlers: dict[int, Any] = {}
        self._saved_at = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._saved_at = time.monotonic()
        if trainer.global_step and (kept := read_facts(self.out / "adapter")):  # resumed
            self.best, self.best_step = kept.get("val_loss"), kept.get("step") or 0
        self._handlers = {n: signal.signal(n, self._on_signal) for n in SIGNALS}

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        while self._handlers:
            signal.signal(*self._handlers.popitem())

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "fit")  # Lightning skips `teardown` then

    def _on_signal(self, signum: int, frame: Any) -> None:
        self._signal = signum

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (trainer.fit_loop.total_batch_idx + 1) % trainer.accumulate_grad_batches:
            return  # in the middle of an optimizer step
        step = trainer.global_step
        # Any rank's signal stops all of them, and any rank's clock lets all of them save, at the same step.
        is_late = self.minutes > 0 and time.monotonic() - self._saved_at >= 60 * self.minutes
        asked = torch.tensor([self._signal is not None, is_late], dtype=torch.float32, device=self.module.device)
        stop, late = trainer.strategy.reduce(asked, reduce_op="sum").tolist()
        if stop:
            self._save(trainer)
            raise Stopped(self._signal or signal.SIGTERM)
        if step >= self.total_steps:
            trainer.should_stop = True  # not Trainer(max_steps=...), which would leave out the last validation
        if trainer.should_stop or late or (step % self.every == 0 if self.every else trainer.is_last_batch):
            self._save(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        loss = self.module.val_loss
        if loss is None or not math.isfinite(loss):
            raise RunError(
                f"step {trainer.global_step}: the validation loss is {loss}; the adapter of this step is "
                "not saved. Lower lr, or add warmup_steps"
            )
        if self.best is None or loss < self.best:
            self.best, self.best_step = loss, trainer.global_step
            self._save_adapter(trainer, {"val_loss": loss})

    def _save(self, trainer: L.Trainer) -> None:
        step = trainer.global_step
        _check_trained(trainer, self.module)
        if not self.validates:
            self._save_adapter(trainer, {})
        folder = self.out / "checkpoints"
        part, path = folder / f".step-{step:08d}.part", folder / f"step-{step:08d}"
        if trainer.is_global_zero:
            folder.mkdir(parents=True, exist_ok=True)
            remove(part)
        trainer.strategy.barrier()
        try:
            trainer.save_checkpoint(part)
        except OSError as e:
            with suppress(OSError):
                remove(part)
            raise RunError(f"{path}: cannot be written: {e.strerror or e}; what was saved before is unchanged") from e
        trainer.strategy.barrier()
        if trainer.is_global_zero:
            put_in_place(part, path)
            for old in written_by_runs(self.out):
                if old.parent == folder and old != path:
                    remove(old)
        self._saved_at = time.monotonic()

    def _save_adapter(self, trainer: L.Trainer, facts: dict[str, float]) -> None:
        with gathered(trainer.strategy, trained_parameters(self.module.model).values()):
            if trainer.is_global_zero:
                extra = self.extra | {"step": trainer.global_step} | facts
                save_adapter(self.module.model, self.out / "adapter", extra)


def _check_trained(trainer: L.Trainer, module: LitRWKV) -> None:
    """RunError on every rank if an optimizer step has left a trained value that is not finite."""
    trained = trained_parameters(module.model)
    with gathered(trainer.strategy, trained.values()):
        bad = next((name for name, p in trained.items() if not torch.isfinite(p).all()), None)
    if bad:
        raise RunError(
            f"step {trainer.global_step}: {bad} is not finite after the step; what was saved before it is kept. Lower "
            "lr, or add warmup_steps"
        )
