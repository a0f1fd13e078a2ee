"""What a merge computes: W + dW in fp32, rounded once, a few rows at a time."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rwkv_miss.adapters.files import AdapterFile
from rwkv_miss.adapters.plan import Plan
from rwkv_miss.checkpoint import TensorSpec
from rwkv_miss.config import Rounding
from rwkv_miss.merging.rounding import Squares, round_into
from rwkv_miss.model.base import RWKV
from rwkv_miss.model.initial_state import file_layout, is_state
from rwkv_miss.plain_reads import Reader

# Elements of a weight that are handled in fp32 at a time: few enough for a core's cache, and so many that Python's
# threads seldom wait for each other.
_PIECE = 2**18


class Part(NamedTuple):
    """One of the adapters that are merged, what it trained, and its weight."""

    adapter: AdapterFile
    plan: Plan
    weight: float

    def adapts(self, name: str) -> bool:
        """Whether the tensor `name` is the weight of a linear with an adapter beside it."""
        return name.removesuffix(".weight") in self.plan.linears

    def changes(self, name: str) -> bool:
        """Whether the adapter changes the tensor `name`."""
        return self.adapts(name) or name in self.plan.whole


_Change = Callable[[Tensor, int], Tensor]
"""Some rows of a tensor (M, in), in fp32, and the first one's number -> what is added to them, in memory of its own."""


class Sums:
    """Computes rows of the merged tensors, in their order.

    squares: what rounding changed of each tensor that is merged, so far.
    """

    def __init__(
        self,
        base: Mapping[str, Tensor],
        specs: Mapping[str, TensorSpec],
        parts: Sequence[Part],
        kind: type[RWKV],
        rounding: Rounding,
        reader: Reader,
    ) -> None:
        self._base, self._specs, self._parts, self._kind = base, specs, parts, kind
        self._rounding, self._reader = rounding, reader
        self._rngs: dict[str, torch.Generator] = {}
        self.squares: dict[str, Squares] = {}

    def write(self, name: str, start: int, out: Tensor) -> bool:
        """Writes rows `start` to `start` + M of the tensor `name` to `out` (M, in), in its dtype. Returns whether all
        that was written is finite."""
        parts = [p for p in self._parts if p.changes(name)]
        W = self._base.get(name)
        W = out.new_zeros(1).expand(self._specs[name].shape) if W is None else W
        W = W.reshape(-1, W.shape[-1])[start : start + len(out)]
        if parts:
            squares = self._write_sums(name, start, W, parts, out)
            # A value that is not finite makes this so too; it may also be beyond fp32 while the values are not.
            return math.isfinite(squares.lost) or is_finite(out)
        if W.dtype == out.dtype:
            self._reader.read(W, out)
        else:
            for rows, out_rows in zip(_pieces(W), _pieces(out), strict=True):
                out_rows.copy_(self._reader.read(rows))
        return is_finite(out)

    def _write_sums(self, name: str, start: int, W: Tensor, parts: Sequence[Part], out: Tensor) -> Squares:
        rng = self._rngs.setdefault(name, rng_of(name))
        before = self.squares.get(name, Squares(0.0, 0.0))
        delta_squares = lost_squares = 0.0
        for (delta, exact), out_rows in zip(self._sums(name, start, W, parts), _pieces(out), strict=True):
            squares = round_into(out_rows, exact, delta, self._rounding, rng)
            delta_squares += squares.delta
            lost_squares += squares.lost
        self.squares[name] = Squares(before.delta + delta_squares, before.lost + lost_squares)
        return self.squares[name]

    def _sums(self, name: str, start: int, W: Tensor, parts: Sequence[Part]) -> Iterable[tuple[Tensor, Tensor]]:
        """(dW, W + dW) of each piece of the rows."""
        if len(parts) == 1 and parts[0].weight == 1 and name in parts[0].plan.whole:
            trained = _trained(parts[0], name, self._kind)[start : start + len(W)]
            for W_rows, trained_rows in zip(_pieces(W), _pieces(trained), strict=True):
                exact = trained_rows.float()
                yield exact - self._reader.read(W_rows).float(), exact
            return
        changes = [_change(p, name, self._kind) for p in parts]
        all_rows = _pieces(W)
        # Used for every piece: new memory for each takes twice the time, because it is in no cache.
        stored, wide = torch.empty_like(all_rows[0]), torch.empty_like(all_rows[0], dtype=torch.float32)
        for rows in all_rows:
            n = len(rows)
            exact = wide[:n].copy_(self._reader.read(rows, stored[:n]))
            delta = changes[0](exact, start)
            for change in changes[1:]:
                delta += change(exact, start)
            start += n
            yield delta, exact.add_(delta)


def is_finite(tensor: Tensor) -> bool:
    """Without a temporary tensor of its size, which `torch.isfinite` needs."""
    return all(bool(torch.isfinite(x)) for x in tensor.aminmax())


def rng_of(name: str) -> torch.Generator:
    """The same random numbers for a tensor in every merge, and others for each tensor."""
    return torch.Generator().manual_seed(zlib.crc32(name.encode()))


def _pieces(x: Tensor) -> tuple[Tensor, ...]:
    return x.split(max(1, _PIECE // x.shape[1]))


def _change(part: Part, name: str, kind: type[RWKV]) -> _Change:
    """What an adapter with its weight adds to the tensor `name`."""
    if part.adapts(name):
        path = name.removesuffix(".weight")
        method, config = part.plan.linears[path]
        tensors = {key: part.adapter.tensors[f"{path}.{key}"] for key in method.names}
        if part.weight == 1:
            return lambda W, start: method.delta(W, start, tensors, config)
        return lambda W, start: method.delta(W, start, tensors, config).mul_(part.weight)
    trained = _trained(part, name, kind)
    return lambda W, start: (trained[start : start + len(W)].float() - W).mul_(part.weight)


def _trained(part: Part, name: str, kind: type[RWKV]) -> Tensor:
    """A tensor that was trained directly, as files have it, as rows (M, in)."""
    trained = part.adapter.tensors[name]
    trained = file_layout(trained, kind) if is_state(name) else trained
    return trained.reshape(-1, trained.shape[-1])
