"""Why a file cannot be read, and what the user can do instead."""

from __future__ import annotations

import importlib.util
import os.path
import shlex
from collections.abc import Iterable
from pathlib import Path

# In the sentences FILE stands for the path, quoted for a shell, so that the commands can be pasted into one.
_PACKED = (
    "by the suffix before this one, it is of no format that is read from a compressed file, as .jsonl{0} would be; "
    "rename it, or unpack it first: {1} FILE"
)

BY_SUFFIX = {
    ".gz": _PACKED.format(".gz", "gunzip -k"),
    ".zst": _PACKED.format(".zst", "zstd -d"),
    ".xz": "is not read; unpack it first: unxz -k FILE",
    ".zip": "an archive is not read; unpack it first: unzip FILE",
}
"""What to do with a file of a suffix that is not read."""

PACKAGES = {
    ".parquet": ("pyarrow", "parquet"),
    ".arrow": ("pyarrow", "parquet"),
    ".zst": ("zstandard", "zstd"),
}
"""By suffix: the package that reads such files, and rwkv-miss's extra that brings it."""


def instead(path: Path, suffixes: Iterable[str], is_read: bool) -> str | None:
    """Why `path` cannot be read and what to do instead; None for a file that can be read.

    Args:
        suffixes: those that have a reader.
        is_read: whether the path's suffix has one.
    """
    suffix = path.suffix.lower()
    readable = f"give a {', '.join(suffixes)} file, a folder of them, or a binidx"
    if os.path.isdir(path):
        return f"is a folder; {readable}"
    if not os.path.exists(path):
        return "no such file" if is_read else f"no such file or folder; {readable}"
    if not os.path.isfile(path):
        return "is a pipe or a device; copy what comes out of it to a file"
    if is_read:
        package, extra = PACKAGES.get(suffix, ("", ""))
        if package and importlib.util.find_spec(package) is None:
            return f"is read by the package {package}, which is not installed: pip install 'rwkv-miss[{extra}]'"
        return None
    if suffix in BY_SUFFIX:
        return f"{suffix!r}: {BY_SUFFIX[suffix].replace('FILE', shlex.quote(str(path)))}"
    return f"suffix {path.suffix!r} is not known; {readable}"
