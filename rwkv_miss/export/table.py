"""The table of the targets: the file formats that a model can be written to."""

from __future__ import annotations

from pathlib import Path

from rwkv_miss.errors import UserError
from rwkv_miss.export import pth
from rwkv_miss.export.target import Target
from rwkv_miss.files import check_name

TARGETS: dict[str, Target] = {"pth": pth.TARGET}


def target_of(path: Path) -> Target:
    """The target whose files are named like `path`.

    Raises:
        UserError: there is none.
    """
    check_name(path, "a file")
    for target in TARGETS.values():
        if path.name.endswith(target.suffix):
            return target
    suffixes = " or ".join(target.suffix for target in TARGETS.values())
    raise UserError(f"{path}: a model is written as {suffixes}; give a name that ends so")
