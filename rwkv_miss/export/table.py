"""The table of the targets: the file formats that a model can be written to."""

from __future__ import annotations

from pathlib import Path

from rwkv_miss.errors import UserError
from rwkv_miss.export import pth
from rwkv_miss.export.target import Target

TARGETS: dict[str, Target] = {"pth": pth.TARGET}


def target_of(path: Path) -> Target:
    """The target whose files are named like `path`.

    Raises:
        UserError: there is none.
    """
    for target in TARGETS.values():
        if path.name.endswith(target.suffix):
            return target
    suffixes = " or ".join(target.suffix for target in TARGETS.values())
    raise UserError(f"{path}: a model is written as {suffixes}; give a name that ends so")
