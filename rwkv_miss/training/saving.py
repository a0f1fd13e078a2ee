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

from rwkv_miss.adapters.files import add_facts, read_facts, save_adapter
from rwkv_miss.adapters.inject import trained_parameters
from rwkv_miss.config import TrainConfig
from rwkv_miss.errors import RunError, Stopped
from rwkv_miss.files import put_in_place, remove
from rwkv_miss.training.card import adapter_card, results
from rwkv_miss.training.checks import written_by_runs
from rwkv_miss.training.lit_module import LitRWKV
from rwkv_miss.training.prepare import Prepared
from rwkv_miss.training.reporting import Reporter
from rwkv_miss.training.zero import gathered

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
"""The signals that end a run after a checkpoint: Ctrl-C, a plain kill, a closed terminal, and what clusters send before
they take a machine back."""
LAST = "adapter_last"
"""The folder of the newest adapter in a run that validates."""


class Saver(L.Callback):
    """Saves a checkpoint every `save_every` optimizer steps (0: at each epoch's last), when `save_minutes` have gone by
    since the last one (0: no limit), before each validation, after the last step, and on `SIGNALS`.

    The folder `adapter` holds the best of the validations so far, or the newest where nothing validates. With
    validations, `adapter_last` beside it holds the newest. The newest `keep` checkpoints are kept; one is written
    beside the others and renamed before the oldest is removed. Checkpoints are taken in `on_train_batch_end` alone:
    there Lightning's counts and the stream's position agree. Later hooks of an epoch that is stopped in its middle
    would count it as a whole one.

    A validation that a checkpoint was saved before, and that did not end, is made again when the run goes on.
    """

    def __init__(
        self,
        module: LitRWKV,
        out: Path,
        config: TrainConfig,
        prepared: Prepared,
        extra: dict[str, Any],
        reporter: Reporter,
    ) -> None:
        self.module, self.out, self.config, self.prepared, self.extra = module, out, config, prepared, extra
        self.reporter = reporter
        self.validates = prepared.val_rows is not None
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
        if trainer.global_step and validation_is_pending(self.out, trainer.global_step, self.prepared):
            _validate(trainer)
        trainer.should_stop = trainer.global_step >= self.prepared.total_steps

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
        step, every, minutes = trainer.global_step, self.config.save_every, self.config.save_minutes
        # Any rank's signal stops all of them, and any rank's clock lets all of them save, at the same step.
        is_late = minutes > 0 and time.monotonic() - self._saved_at >= 60 * minutes
        stop, late = self._any_rank(trainer, self._signal is not None, is_late)
        if stop:
            self._save(trainer)
            raise Stopped(self._signal or signal.SIGTERM)
        if step >= self.prepared.total_steps:
            trainer.should_stop = True  # not Trainer(max_steps=...), which would leave out the last validation
        due = late or self.prepared.validation_is_due(step)
        if trainer.should_stop or due or (step % every == 0 if every else trainer.is_last_batch):
            self._save(trainer)

    def on_validation_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        # A checkpoint was saved before the validation; a base's own validation, before training, has no handlers.
        if self._handlers and any(self._any_rank(trainer, self._signal is not None)):
            raise Stopped(self._signal or signal.SIGTERM)

    def _any_rank(self, trainer: L.Trainer, *asked: bool) -> list[float]:
        """For each of `asked`, on how many ranks it is true."""
        mine = torch.tensor(asked, dtype=torch.float32, device=self.module.device)
        return trainer.strategy.reduce(mine, reduce_op="sum").tolist()

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
            self._save_adapter(trainer, "adapter", {"val_loss": loss})
        if trainer.is_global_zero:
            add_facts(self.out / LAST, {"val_loss": loss})

    def _save(self, trainer: L.Trainer) -> None:
        step = trainer.global_step
        _check_trained(trainer, self.module)
        folder = self.out / "checkpoints"
        part, path = folder / f".step-{step:08d}.part", folder / f"step-{step:08d}"
        if trainer.is_global_zero:
            folder.mkdir(parents=True, exist_ok=True)
            remove(part)
        self._save_adapter(trainer, LAST if self.validates else "adapter", {})
        trainer.strategy.barrier()
        try:
            trainer.save_checkpoint(part)
            trainer.strategy.barrier()
        except BaseException as e:
            if trainer.is_global_zero:  # all ranks of DeepSpeed write to it, and would fail for its lack
                with suppress(OSError):
                    remove(part)
            if isinstance(e, OSError):
                said = f"{path}: cannot be written: {e.strerror or e}; what was saved before is unchanged"
                raise RunError(said) from e
            raise
        if trainer.is_global_zero:
            put_in_place(part, path)
            checkpoints = sorted(old for old in written_by_runs(self.out) if old.parent == folder)
            for old in checkpoints[: -self.config.keep]:
                remove(old)
        self._saved_at = time.monotonic()

    def _save_adapter(self, trainer: L.Trainer, name: str, facts: dict[str, float]) -> None:
        with gathered(trainer.strategy, trained_parameters(self.module.model).values()):
            if trainer.is_global_zero:
                step, folder = trainer.global_step, self.out / name
                extra = self.extra | {"step": step} | facts
                said = results(step, self.prepared.total_steps, self.reporter, facts.get("val_loss"))
                extra["card"] = extra["card"] | {"Results": said}
                card = adapter_card(folder, self.config, self.module.model, extra)
                save_adapter(self.module.model, folder, extra, card)


def validation_is_pending(out: Path, step: int, prepared: Prepared) -> bool:
    """Whether the checkpoint of optimizer step `step` was saved before a validation that did not end."""
    if not prepared.validation_is_due(step):
        return False
    last = read_facts(out / LAST)
    return last.get("step") != step or "val_loss" not in last


def _validate(trainer: L.Trainer) -> None:
    """A validation outside Lightning's training loop, which runs it as this does (2.6, `TrainingEpochLoop`)."""
    loop = trainer.fit_loop.epoch_loop.val_loop
    loop.restarting = False
    trainer.validating = True
    loop.run()
    trainer.training = True


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
