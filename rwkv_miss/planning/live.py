"""Counts the bytes of the tensors that are alive, on any device: on the meta device they are those that the same
operations would hold elsewhere."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass
class Allocation:
    """A storage: its bytes, what it is for, and the times (numbers of storages made or freed until then) at which it
    was made and freed; it lives until then and no longer."""

    size: int
    kind: str
    born: int
    died: float = float("inf")


class Live(TorchDispatchMode):
    """Follows the storages made while it is active, from the operation that returns them until they are freed.

    peak: the most bytes alive at once. peaks: the same for each phase that `phase` has named, and when that was. kind:
    what storages made from now on are for.
    """

    def __init__(self, kind: str = "") -> None:
        super().__init__()
        self.now = self.peak = 0
        self.kind = kind
        self.peaks: dict[str, tuple[int, int]] = {}
        self.phase = ""
        self._time = 0
        self._all: list[Allocation] = []
        self._held: dict[int, Allocation] = {}

    def enter(self, phase: str) -> None:
        """What happens from now on is of that phase."""
        self.phase = phase
        self._note_peak()

    def label(self, tensors: Iterable[Tensor], kind: str) -> None:
        """Says what the storages of these tensors are for."""
        for x in tensors:
            if found := self._held.get(x.untyped_storage()._cdata):
                found.kind = kind

    def at_peak(self, phase: str) -> dict[str, int]:
        """The bytes of each kind that were alive when the phase held the most."""
        _, time = self.peaks[phase]
        found: dict[str, int] = {}
        for x in self._all:
            if x.born <= time < x.died:
                found[x.kind] = found.get(x.kind, 0) + x.size
        return found

    def __torch_dispatch__(
        self, function: Callable, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        before = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        result = function(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and (key := x.untyped_storage()._cdata) not in before and key not in self._held:
                storage = x.untyped_storage()
                self._time += 1
                self._held[key] = allocation = Allocation(storage.nbytes(), self.kind, self._time)
                self._all.append(allocation)
                self.now += allocation.size
                self._note_peak()
                weakref.finalize(storage, self._free, key)
        return result

    def _note_peak(self) -> None:
        self.peak = max(self.peak, self.now)
        if self.now > self.peaks.get(self.phase, (-1, 0))[0]:
            self.peaks[self.phase] = self.now, self._time

    def _free(self, key: int) -> None:
        self._time += 1
        allocation = self._held.pop(key)
        allocation.died = self._time
        self.now -= allocation.size
