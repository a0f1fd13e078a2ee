"""The recurrences: one public function each, over several backends that are tested against one reference."""

from rwkv_miss.config import BACKENDS
from rwkv_miss.ops.wkv6 import wkv6
from rwkv_miss.ops.wkv7 import wkv7

__all__ = ["BACKENDS", "wkv6", "wkv7"]
