"""What the process keeps of memory that was freed."""

from __future__ import annotations

import platform
import sys

import pytest

from tests.processes import run_process

# The pages that the system hands out for 200 MB of blocks that were freed just before, of 51,000.
PAGES = """
import ctypes
import resource
from rwkv_miss.heap import keep_freed_memory

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
keep_freed_memory()
for _ in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [ctypes.c_void_p(libc.malloc(20_000_000)) for _ in range(10)]
    for block in blocks:
        ctypes.memset(block, 1, 20_000_000)
    for block in blocks:
        libc.free(block)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_freed_memory_is_used_again():
    result = run_process([sys.executable, "-c", PAGES], timeout=120)
    assert int(result.stdout) < 5_000, result.stderr
