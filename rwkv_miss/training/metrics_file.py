"""metrics.csv: a row for each report of a run. Lightning's own CSV logger deletes the file of a run that is resumed."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import Logger
from lightning.fabric.utilities.rank_zero import rank_zero_only

from rwkv_miss.files import atomic_write


class MetricsFile(Logger):
    """Appends rows of `step` and `columns` to `path`, on the first rank. Rows that are there already for steps up to
    `step` are kept; the others are removed, since their steps are about to be done again."""

    def __init__(self, path: Path, columns: list[str], step: int) -> None:
        super().__init__()
        self.path, self.columns = path, ["step", *columns]
        self._start(step)

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def _start(self, step: int) -> None:
        rows: list[dict[str, str]] = []
        if self.path.exists():
            with self.path.open(newline="") as f:
                rows = [row for row in csv.DictReader(f) if int(row["step"]) <= step]
        with atomic_write(self.path) as part, part.open("w", newline="") as f:
            # A column that a run had before, and has no more, is left out.
            writer = csv.DictWriter(f, self.columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
        self._file = self.path.open("a", newline="")

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        row = {name: f"{x:.6g}" if isinstance(x, float) else x for name, x in metrics.items()}
        csv.DictWriter(self._file, self.columns).writerow({"step": step, **row})
        self._file.flush()

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """config.yaml has them."""

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self._file.close()
