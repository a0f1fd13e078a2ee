"""The tensors of many adapters, in stacks: for each linear one with the products of all adapters of a form."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from rwkv_miss.ops.blocks import block_sum
from rwkv_miss.ops.products import add_products


class Form(NamedTuple):
    """What the adapters in a stack have in common: their rank, and whether S is the sums over x's blocks of so many
    columns, as in MiSS, and not x A."""

    rank: int
    sums_blocks: bool


class Part(NamedTuple):
    """What one adapter adds to a linear's result: S D. D (rank, out); A (in, rank), None where S needs none."""

    D: Tensor
    A: Tensor | None


class Rows(NamedTuple):
    """Which rows of a batch have adapters of a form, int64 (M), and in which slots these lie, in ascending order."""

    rows: Tensor
    slots: Tensor


class Stacks:
    """The adapters of one form: slot i of each linear's stack is of the same adapter, zeros where it has nothing beside
    that linear. The stacks double when all slots are taken, and do not shrink."""

    def __init__(self, form: Form) -> None:
        self._form = form
        self._free: list[int] = []
        self._size = 0
        self._D: dict[str, Tensor] = {}  # (slots, rank, out) of each linear
        self._A: dict[str, Tensor] = {}  # (slots, in, rank)

    def put(self, parts: Mapping[str, Part], like: Tensor) -> int:
        """Copies an adapter's parts, by the paths of their linears, into a slot, whose number it returns. The stacks
        have the dtype and the device of `like`."""
        if not self._free:
            size = max(1, 2 * self._size)
            for stacks in (self._D, self._A):
                for path, stack in stacks.items():
                    stacks[path] = torch.cat([stack, stack.new_zeros(size - self._size, *stack.shape[1:])])
            self._free = list(reversed(range(self._size, size)))
            self._size = size
        slot = self._free.pop()
        for stacks, name in ((self._D, "D"), (self._A, "A")):
            found = {path: tensor for path, part in parts.items() if (tensor := getattr(part, name)) is not None}
            for path in found.keys() - stacks.keys():
                stacks[path] = like.new_zeros(self._size, *found[path].shape)
            for path, stack in stacks.items():
                stack[slot] = found.get(path, 0)
        return slot

    def free(self, slot: int) -> None:
        self._free.append(slot)

    def rows(self, slots: Iterable[int | None], device: torch.device) -> Rows | None:
        """The rows of a batch by the slots of their adapters, None for those that have none here; None where all are
        None."""
        found = sorted((slot, row) for row, slot in enumerate(slots) if slot is not None)
        if not found:
            return None
        return Rows(*(torch.tensor([pair[i] for pair in found], device=device) for i in (1, 0)))

    def add_to(self, y: Tensor, path: str, x: Tensor, at: Rows) -> None:
        """Adds what the adapters have beside the linear `path` to its result y (B, T, out), in place, for the inputs x
        (B, T, in)."""
        if path not in self._D:
            return
        if self._form.sums_blocks:
            S = block_sum(x.flatten(0, 1), self._form.rank).view(*x.shape[:2], -1)
        else:
            S = x.new_zeros(*x.shape[:2], self._form.rank)
            add_products(S, x, self._A[path], at.rows, at.slots)
        add_products(y, S, self._D[path], at.rows, at.slots)
