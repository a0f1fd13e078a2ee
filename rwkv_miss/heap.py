"""How a CPU's tensors get their memory: from glibc's heap, or beside it from the system. Other C libraries and systems
have no such calls; there nothing is asked for."""

from __future__ import annotations

import ctypes
import mmap

from torch import Tensor

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


def use_large_pages(x: Tensor) -> None:
    """Asks the system for pages of 2 MB for a tensor on the CPU that is not written yet, if it has memory of its own
    beside the heap. As much memory in small pages takes several times as long to hand out."""
    madvise, advice = getattr(ctypes.CDLL(None), "madvise", None), getattr(mmap, "MADV_HUGEPAGE", None)
    if x.device.type == "cpu" and x.nbytes > _LARGEST and madvise and advice:
        begin = -(-x.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        length = x.data_ptr() + x.nbytes - begin
        madvise(ctypes.c_void_p(begin), ctypes.c_size_t(length), advice)  # a system without such pages refuses
