"""What a run leaves on the disk: checkpoints to resume from, and the adapter. A crash loses nothing saved."""

from __future__ import annotations

import math
import re
import signal
from pathlib import Path
from typing import Any

import lightning as L
import torch

from rwkv_miss.adapters.files import read_facts, save_adapter
from rwkv_miss.adapters.full import checkpoint_key
from rwkv_miss.errors import RunError
from rwkv_miss.files import put_in_place, remove
from rwkv_miss.training.strategies import gathered


class Stopped(Exception):
    """The run was asked to stop by a signal and has saved a checkpoint."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


def last_checkpoint(folder: Path) -> tuple[Path, int] | None:
    """The newest whole checkpoint of a run and its optimizer step; None where there is none."""
    found = [(int(m.group(1)), p) for p in folder.glob("step-*") if (m := re.fullmatch(r"step-(\d+)", p.name))]
    return (max(found)[1], max(found)[0]) if found else None


class Saver(L.Callback):
    """Saves every `every` optimizer steps (0: at each epoch's last), after the last, and on SIGINT or SIGTERM.

    The adapter folder holds the best of the validations so far, or the newest where nothing validates. Only the
    newest checkpoint is kept; it is written beside the last and renamed before the last is removed. Checkpoints
    are taken in `on_train_batch_end` alone: there Lightning's counts and the stream's position agree, while after
    an epoch that was stopped in its middle they would call it whole.
    """

    def __init__(self, out: Path, every: int, total_steps: int, validates: bool, extra: dict[str, Any]) -> None:
        self.out, self.every, self.total_steps, self.validates, self.extra = out, every, total_steps, validates, extra
        self.best: float | None = None
        self.best_step = 0
        self._signal: int | None = None
        self._handlers: dict[int, Any] = {}

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.global_step and (kept := read_facts(self.out / "adapter")):  # resumed
            self.best, self.best_step = kept.get("val_loss"), kept["step"]
        self._handlers = {n: signal.signal(n, self._on_signal) for n in (signal.SIGINT, signal.SIGTERM)}

    def teardown(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        while self._handlers:
            signal.signal(*self._handlers.popitem())

    def on_exception(self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, module, "fit")  # which Lightning leaves out then

    def _on_signal(self, signum: int, frame: Any) -> None:
        self._signal = signum

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        if (trainer.fit_loop.total_batch_idx + 1) % trainer.accumulate_grad_batches:
            return  # in the middle of an optimizer step
        step = trainer.global_step
        # Any rank's signal stops all of them, at the same step.
        if trainer.strategy.reduce_boolean_decision(self._signal is not None, all=False):
            self._save(trainer, module)
            raise Stopped(self._signal or signal.SIGTERM)
        if step >= self.total_steps:
            trainer.should_stop = True  # not Trainer(max_steps=...), which would leave out the last validation
        if trainer.should_stop or (step % self.every == 0 if self.every else trainer.is_last_batch):
            self._save(trainer, module)

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        if not math.isfinite(module.val_loss):
            raise RunError(
                f"step {trainer.global_step}: the validation loss is {module.val_loss}; the adapter of this step is "
                "not saved. Lower lr, or add warmup_steps"
            )
        if self.best is None or module.val_loss < self.best:
            self.best, self.best_step = module.val_loss, trainer.global_step
            self._save_adapter(trainer, module, {"val_loss": module.val_loss})

    def _save(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        step = trainer.global_step
        _check_trained(trainer, module)
        if not self.validates:
            self._save_adapter(trainer, module, {})
        folder = self.out / "checkpoints"
        part, path = folder / f".step-{step:08d}.part", folder / f"step-{step:08d}"
        if trainer.is_global_zero:
            folder.mkdir(parents=True, exist_ok=True)
            remove(part)
        trainer.strategy.barrier()
        trainer.save_checkpoint(part)
        trainer.strategy.barrier()
        if trainer.is_global_zero:
            put_in_place(part, path)
            for old in folder.glob("*step-*"):
                if old != path:
                    remove(old)

    def _save_adapter(self, trainer: L.Trainer, module: L.LightningModule, facts: dict[str, float]) -> None:
        with gathered(trainer.strategy, [p for p in module.parameters() if p.requires_grad]):
            if trainer.is_global_zero:
                save_adapter(module.model, self.out / "adapter", self.extra | {"step": trainer.global_step} | facts)


def _check_trained(trainer: L.Trainer, module: L.LightningModule) -> None:
    """RunError on every rank if an optimizer step has left a trained value that is not finite."""
    trained = {checkpoint_key(name): p for name, p in module.model.named_parameters() if p.requires_grad}
    with gathered(trainer.strategy, trained.values()):
        bad = next((name for name, p in trained.items() if not torch.isfinite(p).all()), None)
    if bad:
        raise RunError(
            f"step {trainer.global_step}: {bad} is not finite after the step; what was saved before it is kept. Lower "
            "lr, or add warmup_steps"
        )
