"""The table of the versions of RWKV."""

from __future__ import annotations

from rwkv_miss.model.base import RWKV
from rwkv_miss.model.rwkv6 import RWKV6
from rwkv_miss.model.rwkv7 import RWKV7

MODELS: dict[int | str, type[RWKV]] = {cls.version: cls for cls in (RWKV6, RWKV7)}
"""The model of each version. A checkpoint is taken for the first that recognises it, so a variant must stand before the
version that it is a variant of."""
