"""glibc's heap, where a CPU's tensors lie. Other C libraries have no such calls; there nothing is asked for."""

from __future__ import annotations

import ctypes

# mallopt(3): from how many bytes on free memory at the heap's end is given back, and a block is mapped by itself. 32 MB
# is what glibc raises the second to by itself.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_NEVER, _LARGEST = 2**31 - 1, 2**25


def keep_freed_memory() -> None:
    """Asks glibc to keep freed memory for what is allocated next, in this process from now on. Otherwise a training
    step gives much of its memory back and gets it again page by page, each of which the system clears."""
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(_TRIM_THRESHOLD, _NEVER)
        mallopt(_MMAP_THRESHOLD, _LARGEST)


def give_freed_memory_back() -> None:
    """Asks glibc to return freed memory to the system. Small nodes of the autograd graph stay between the activations
    of a chunk; when the activations are freed, glibc (2.36) cannot reuse the gaps for aligned blocks of the same size,
    so the freed memory adds up from chunk to chunk."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)
