"""The entry to training: makes the quick checks before torch and Lightning are imported."""

from __future__ import annotations

import gc
import os
from contextlib import nullcontext
from pathlib import Path

from rich.console import Console

from rwkv_miss.config import TrainConfig
from rwkv_miss.errors import RunError
from rwkv_miss.files import claimed
from rwkv_miss.training.checks import check_run, is_first_process
from rwkv_miss.training.parent import end_with_parent
from rwkv_miss.training.result import TrainResult


def train(config: TrainConfig, console: Console | None = None) -> TrainResult:
    """Fine-tunes as `config` says. Everything the user gave is checked before anything is written.

    Args:
        console: where progress is shown; None shows nothing.

    Raises:
        UserError: something in the settings, the base, the data or the output folder is wrong.
        RunError: the loss was not finite, or the GPU's memory too small.
        Stopped: a signal ended the run, after a checkpoint.
    """
    end_with_parent()
    resume = check_run(config)
    first = is_first_process()
    if console is None or not first:
        console = Console(quiet=True)
    # Imported before the folder is made: Ctrl-C during an import ends the process at once. Nothing that is imported is
    # garbage, and looking for it would take a fifth of the imports' time.
    collects = gc.isenabled()
    gc.disable()
    try:
        from rwkv_miss.training.run import run
    finally:
        if collects:
            gc.enable()

    with claimed(Path(config.out)) if first else nullcontext():
        try:
            return run(config, resume, console)
        except BrokenPipeError:
            raise  # the reader of what is printed has gone
        except OSError as e:
            where = os.fsdecode(e.filename) if isinstance(e.filename, (str, bytes)) else config.out
            raise RunError(f"{where}: {e.strerror or e}; what was saved before is kept") from e
