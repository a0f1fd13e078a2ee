"""The library of this package's operators.

They are made without torch.library.custom_op, whose calls take 30 microseconds more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

LIBRARY = torch.library.Library("rwkv_miss", "FRAGMENT")


def define(name: str, signature: str, fake: Callable[..., Any]) -> bool:
    """Defines the operator `rwkv_miss::{name}` of a signature "(...) -> ...", and what it returns on fake tensors.

    Returns:
        False if it is there: an operator outlives its module, which may be imported once more.
    """
    if hasattr(torch.ops.rwkv_miss, name):
        return False
    LIBRARY.define(name + signature)
    torch.library.register_fake(f"rwkv_miss::{name}", fake, lib=LIBRARY)
    return True
