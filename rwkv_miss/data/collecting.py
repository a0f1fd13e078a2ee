"""What reading data warns of, for a later place than where it is found."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

_log = logging.getLogger("rwkv_miss")


@contextmanager
def collected_warnings() -> Iterator[list[str]]:
    """Collects the warnings that the package gives in the context, in the place of showing them; also in a process that
    shows none."""
    found: list[str] = []

    def passes(record: logging.LogRecord) -> bool:
        if record.levelno == logging.WARNING:
            found.append(record.getMessage())
        return record.levelno != logging.WARNING

    level = _log.level
    _log.addFilter(passes)
    if not _log.isEnabledFor(logging.WARNING):
        _log.setLevel(logging.WARNING)
    try:
        yield found
    finally:
        _log.removeFilter(passes)
        _log.setLevel(level)
