"""The recurrences WKV-6 and WKV-7: a public function each, over backends that are tested against a reference."""

from rwkv_miss.config import BACKENDS
from rwkv_miss.ops.wkv6 import wkv6
from rwkv_miss.ops.wkv7 import wkv7

__all__ = ["BACKENDS", "wkv6", "wkv7"]
