"""metrics.csv: a row for each report of a run. Lightning's own CSV logger deletes the file of a run that is resumed."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import Logger
from lightning.fabric.utilities.rank_zero import rank_zero_only

from rwkv_miss.files import atomic_write
from rwkv_miss.training.appended import AppendedFile
from rwkv_miss.training.figures import read_figures


class MetricsFile(Logger):
    """Appends rows of `step` and `columns` to `path`, on the first rank. If the run goes on from optimizer step `step`,
    the rows that are there already up to that step are kept; the others are removed, since their steps are about to be
    done again. A run that starts at step 0 keeps none. A validation of `step` that is made again, because it was not
    known to have ended, has no second row.

    Raises RunError where the disk refuses a row.
    """

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
        rows = [row for row in read_figures(self.path) if int(row["step"]) <= step] if step else []
        self._validated = step if any(int(row["step"]) == step and row.get("val_loss") for row in rows) else None
        # A column that a run had before, and has no more, is left out.
        kept = [{column: row.get(column, "") for column in self.columns} for row in rows]
        with atomic_write(self.path) as part:
            part.write_text("".join(map(self._line, [dict(zip(self.columns, self.columns, strict=True)), *kept])))
        self._file = AppendedFile(self.path)

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if "val_loss" in metrics and step == self._validated:
            return
        row = {name: f"{x:.6g}" if isinstance(x, float) else x for name, x in metrics.items()}
        self._file.write(self._line({"step": step, **row}).encode())

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """config.yaml has them."""

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self._file.close()

    def _line(self, row: Mapping[str, Any]) -> str:
        text = io.StringIO(newline="")
        csv.DictWriter(text, self.columns, lineterminator="\n").writerow(row)
        return text.getvalue()
