"""run.json: what was run, where, and how it ended; and the report that is made of it at the end."""

from __future__ import annotations

import json
import logging
import shlex
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import lightning as L

import rwkv_miss
from rwkv_miss.doctor import machine
from rwkv_miss.errors import Stopped, UserError
from rwkv_miss.files import atomic_write
from rwkv_miss.training.report import write_report

_log = logging.getLogger("rwkv_miss")


class Record(L.Callback):
    """Writes `out`/run.json when a run begins or goes on, and again with its end, and then report.html, on the first
    rank. If the disk has no room for these two at the end, that is a warning: all else was saved, or has a message.
    """

    def __init__(self, out: Path, total_steps: int, introduction: list[str]) -> None:
        self.out = out
        self.facts: dict[str, Any] = {"total_steps": total_steps, "trained": introduction}
        self._is_begun = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        self.facts |= {
            "command": shlex.join(sys.argv),
            "from_step": trainer.global_step,
            "started": _now(),
            "processes": trainer.world_size,
            "machine": {"rwkv_miss": rwkv_miss.__version__, **dict(machine())},
        }
        self._write()
        self._is_begun = True

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._end({"signal": None, "error": None})

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if isinstance(exception, Stopped):
            self._end({"signal": str(exception), "error": None})
        else:
            self._end({"signal": None, "error": str(exception) or type(exception).__name__})

    def _end(self, cause: dict[str, str | None]) -> None:
        if not self._is_begun:  # not the first rank, or nothing has been written to the folder
            return
        self.facts |= {"ended": _now(), **cause}
        try:
            self._write()
            write_report(self.out)
        except UserError as e:
            _log.warning("%s", e)

    def _write(self) -> None:
        with atomic_write(self.out / "run.json") as part:
            part.write_text(json.dumps(self.facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")
