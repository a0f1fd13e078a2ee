"""Weights & Biases: the figures of a run as one of its runs, by Lightning's logger."""

from __future__ import annotations

import os
from pathlib import Path

import yaml
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import WandbLogger

from rwkv_miss.errors import RunError


class WandbRun(WandbLogger):
    """A run of the name of `out` in the project WANDB_PROJECT or rwkv_miss, with the settings of config.yaml; its files
    are in `out`/wandb. If the training goes on from optimizer step `step`, the run that is there goes on. What is done
    without a network, and without a login, is W&B's own setting WANDB_MODE.

    Raises RunError where W&B cannot begin.
    """

    def __init__(self, out: Path, step: int) -> None:
        project = os.environ.get("WANDB_PROJECT", "rwkv_miss")
        super().__init__(out.resolve().name, out, id=_last_id(out) if step else None, project=project)
        self._begin(out)

    @rank_zero_only
    def _begin(self, out: Path) -> None:
        import wandb

        try:
            self.experiment.config.update(yaml.safe_load((out / "config.yaml").read_text()), allow_val_change=True)
        except wandb.errors.Error as e:
            raise RunError(
                f"W&B cannot begin a run: {str(e).rstrip('.')}; set WANDB_MODE=offline, which needs no login and no "
                "network, or leave wandb out of loggers"
            ) from e

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self.experiment.finish(exit_code=0 if status == "success" else 1)


def _last_id(out: Path) -> str | None:
    """W&B's name of the run that it last wrote to this folder; None if there is none."""
    link = out / "wandb" / "latest-run"
    return link.resolve().name.rpartition("-")[2] if link.exists() else None
