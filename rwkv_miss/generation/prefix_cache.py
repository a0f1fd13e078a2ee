"""States of texts that a model has read, so that a text that begins with one of them is read from there on."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from rwkv_miss.adapters.serving import Served
from rwkv_miss.model.state import State


class Kept(NamedTuple):
    """state: of one sequence that has read `length` tokens. logits: (V,) after the last of them, where they are known;
    only with them can a text be no longer than the one that was kept."""

    length: int
    state: State
    logits: Tensor | None


class PrefixCache:
    """The texts that were used last, each with the adapter that read it.

    Args:
        budget: the most bytes that states, logits and tokens may take. They lie on the model's device.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self._bytes = 0
        self._kept: OrderedDict[tuple[Served | None, bytes], Kept] = OrderedDict()

    def keep(self, adapter: Served | None, ids: Sequence[int], state: State, logits: Tensor | None) -> None:
        """Keeps the state of a text, in memory of its own, and gives up the texts that were not used for the longest
        time, as far as the budget asks for it."""
        key = (adapter, _packed(ids))
        before = self._kept.pop(key, None)
        if before is not None:
            self._bytes -= _size(key, before)
            logits = before.logits if logits is None else logits
        kept = Kept(len(ids), state, logits)
        if _size(key, kept) > self.budget:
            return
        self._kept[key] = kept
        self._bytes += _size(key, kept)
        while self._bytes > self.budget:
            self._bytes -= _size(*self._kept.popitem(last=False))

    def find(self, adapter: Served | None, ids: Sequence[int]) -> Kept | None:
        """The longest text kept of the adapter that `ids` begins with and that saves the rest from being read alone."""
        text = _packed(ids)
        found = [
            key
            for key, kept in self._kept.items()
            if key[0] is adapter and text.startswith(key[1]) and (kept.logits is not None or kept.length < len(ids))
        ]
        if not found:
            return None
        best = max(found, key=lambda key: len(key[1]))
        self._kept.move_to_end(best)
        return self._kept[best]

    def drop(self, adapter: Served) -> None:
        """Gives up all texts of an adapter."""
        for key in [key for key in self._kept if key[0] is adapter]:
            self._bytes -= _size(key, self._kept.pop(key))


def _packed(ids: Sequence[int]) -> bytes:
    """The tokens as bytes, all of the same number: a text begins with another exactly where its bytes do."""
    return array("q", ids).tobytes()


def _size(key: tuple[Served | None, bytes], kept: Kept) -> int:
    state = kept.state
    tensors = [state.att_shift, state.wkv, state.ffn_shift, *([] if kept.logits is None else [kept.logits])]
    return len(key[1]) + sum(tensor.nbytes for tensor in tensors)
