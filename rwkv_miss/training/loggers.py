"""Where the figures of a run are written, by Lightning's loggers. Importing this imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning.fabric.loggers.logger import Logger


def _csv(out: Path, columns: list[str], step: int) -> Logger:
    from rwkv_miss.training.metrics_file import MetricsFile

    return MetricsFile(out / "metrics.csv", columns, step)


def _tensorboard(out: Path, columns: list[str], step: int) -> Logger:
    # Fabric's, since the Trainer's own also writes a file of hyperparameters, which config.yaml has.
    from lightning.fabric.loggers import TensorBoardLogger

    return TensorBoardLogger(out, name="tensorboard", version="", purge_step=step + 1)


LOGGERS: dict[str, Callable[[Path, list[str], int], Logger]] = {
    "csv": _csv,
    "tensorboard": _tensorboard,
}
"""What `TrainConfig.loggers` may name: (the run's folder, the names of all figures but the step, the optimizer step
that the run goes on from) -> a logger. Figures that an earlier process has written for later steps are
obsolete: these steps are run again."""
