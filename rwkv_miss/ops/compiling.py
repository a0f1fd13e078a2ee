"""What is said about code that is compiled at its first use, for a CPU or a GPU."""

from __future__ import annotations

import logging
from pathlib import Path

_log = logging.getLogger("rwkv_miss")


def say_compiling(source: Path, target: str) -> None:
    """Logs that compiling begins, so that nobody takes the pause for a hang; `target` is what it is compiled for."""
    _log.info("compiling %s for %s: some seconds, this once", source.name, target)


def warn_without_cache(source: Path, error: OSError) -> None:
    """Logs that what is compiled cannot be kept."""
    _log.warning("%s is compiled again in every process: cannot write to the cache (%s)", source.name, error)
