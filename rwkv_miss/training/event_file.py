"""tensorboard/: the figures of a run as TensorBoard reads them. Lightning's own logger writes in a thread of its own,
where the error of a full disk ends the thread, with a traceback, and not the run."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import Logger
from lightning.fabric.utilities.rank_zero import rank_zero_only
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from rwkv_miss.training.appended import AppendedFile


class EventFile(Logger):
    """A new event file in `folder`, on the first rank, for the steps after optimizer step `step`, or for all if that is
    0. TensorBoard forgets what earlier files have of these steps.

    Raises RunError where the disk refuses.
    """

    def __init__(self, folder: Path, step: int) -> None:
        super().__init__()
        self._start(folder, step)

    @property
    def name(self) -> str:
        return "tensorboard"

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def _start(self, folder: Path, step: int) -> None:
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        self._file = AppendedFile(folder / name)
        self._records = RecordWriter(self._file)
        self._write(file_version="brain.Event:2")
        self._write(step=step + 1 if step else 0, session_log=SessionLog(status=SessionLog.START))

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        values = [Summary.Value(tag=name, simple_value=x) for name, x in metrics.items()]
        self._write(step=step, summary=Summary(value=values))

    @rank_zero_only
    def log_text(self, key: str, columns: list[str], data: list[list[str]], step: int) -> None:
        """Rows of text under the tag `key`, as Lightning's WandbLogger has it: each value below its column's name."""
        from torch.utils.tensorboard.summary import text

        rows = ["\n\n".join(f"**{c}**\n\n{_verbatim(x)}" for c, x in zip(columns, row, strict=True)) for row in data]
        self._write(step=step, summary=text(key, "\n\n---\n\n".join(rows)))

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """config.yaml has them."""

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self._file.close()

    def _write(self, **fields: Any) -> None:
        self._records.write(Event(wall_time=time.time(), **fields).SerializeToString())


def _verbatim(text: str) -> str:
    """Markdown that shows the text as it stands."""
    return "\n".join(f"    {line}" for line in text.splitlines())
