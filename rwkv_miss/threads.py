"""The threads of PyTorch beside our own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread_each() -> Iterator[None]:
    """PyTorch has one thread in the context for each of ours: if it had more, they would wait for each other longer
    than they work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
