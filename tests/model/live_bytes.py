"""Counts the bytes of the tensors that are alive: what a step holds, without the noise of a process's memory."""

from __future__ import annotations

from collections.abc import Callable

from rwkv_miss.planning.live import Live


def peak_bytes(step: Callable[[], object]) -> int:
    """The most bytes of tensors made by `step()`, backward pass included, that were alive at once."""
    with Live() as live:
        step()
    return live.peak
