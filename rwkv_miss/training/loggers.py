"""Where the figures of a run are written, by Lightning's loggers. Importing this imports no torch."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning.fabric.loggers.logger import Logger


def _csv(out: Path, columns: list[str], step: int) -> Logger:
    from rwkv_miss.training.metrics_file import MetricsFile

    return MetricsFile(out / "metrics.csv", columns, step)


def _tensorboard(out: Path, columns: list[str], step: int) -> Logger:
    from rwkv_miss.training.event_file import EventFile

    return EventFile(out / "tensorboard", step)


def _wandb(out: Path, columns: list[str], step: int) -> Logger:
    from rwkv_miss.training.wandb_run import WandbRun

    return WandbRun(out, step)


LOGGERS: dict[str, Callable[[Path, list[str], int], Logger]] = {
    "csv": _csv,
    "tensorboard": _tensorboard,
    "wandb": _wandb,
}
"""What `TrainConfig.loggers` may name: (the run's folder, the names of all figures but the step, the optimizer step
that the run goes on from) -> a logger. Figures that an earlier process has written for later steps are
obsolete: these steps are run again. A logger that has Lightning's `log_text` also gets the sample answers."""
ALWAYS = ("csv", "tensorboard")
"""The loggers that every run has: metrics.csv is what its report is made of."""
_PACKAGES = {"wandb": "wandb"}  # what a logger needs that is not installed with rwkv_miss, by pip's name


def problems(names: Sequence[str]) -> list[str]:
    """Every mistake in `TrainConfig.loggers`."""
    found = [f"loggers has {name!r}; there are {', '.join(LOGGERS)}" for name in names if name not in LOGGERS]
    for package in (_PACKAGES[name] for name in names if name in _PACKAGES):
        if importlib.util.find_spec(package) is None:
            found.append(f"loggers has {package}, which is not installed; install it: pip install {package}")
    return found
