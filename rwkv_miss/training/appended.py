"""A file of a run that grows while the run goes on."""

from __future__ import annotations

from pathlib import Path

from rwkv_miss.errors import RunError


class AppendedFile:
    """Appends to `path`, whose folder is made. What was written is with the system when `write` returns, so that a run
    that is killed loses nothing of it.

    Raises RunError where the disk refuses.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Without a buffer, whose rest would be written, and fail, once more when the file is closed.
            self._file = path.open("ab", buffering=0)
        except OSError as e:
            raise self._refused(e) from e

    def write(self, data: bytes) -> None:
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as e:
            raise self._refused(e) from e

    def close(self) -> None:
        self._file.close()

    def _refused(self, e: OSError) -> RunError:
        return RunError(f"{self.path}: cannot be written: {e.strerror or e}; what was saved before is unchanged")
