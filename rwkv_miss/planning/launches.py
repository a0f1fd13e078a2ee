"""Counts the kernels that a training step launches on a GPU and the bytes that they move, by running it on the meta
device, and what would be left of both if all that happens between two matrix products were one kernel."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rwkv_miss.config import TrainConfig
from rwkv_miss.model.log_probs import batch_log_probs
from rwkv_miss.ops.wkv_operators import WKV6, WKV7, WKV7_CHUNK
from rwkv_miss.planning.shapes import Base
from rwkv_miss.planning.step import WithoutValues, batch_of, model_of

KINDS = ("products", "recurrence", "passes")
_PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "baddbmm"}
_NO_LAUNCH = {"empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided"}
_ONLY_WRITES = {"copy_", "fill_", "zero_"}
_RECURRENCES = {f"{op.name}_{device}" for op in (WKV6, WKV7, WKV7_CHUNK) for device in ("cuda", "cpu")}
# Our operators that launch more than one kernel (`rwkv_miss.ops.cuda.wkv`), and how many.
_LAUNCHES = {"wkv6_cuda_backward": 2, "wkv7_cuda_backward": 2}


class Content(NamedTuple):
    """What a storage holds from one writing to the next. size: the bytes of the whole storage."""

    storage: int
    version: int
    size: int


class View(NamedTuple):
    """A part of a content that a tensor shows. Repeated elements, those of stride 0, are counted once."""

    content: Content
    offset: int
    shape: tuple[int, ...]
    bytes: int


@dataclass(frozen=True)
class Operation:
    """An operation that launches kernels: its name, one of `KINDS`, how many it launches, and what it reads and
    writes."""

    name: str
    kind: str
    launches: int
    reads: frozenset[View]
    writes: frozenset[View]

    @property
    def bytes(self) -> int:
        return _bytes(self.reads) + _bytes(self.writes)


class Trace(TorchDispatchMode):
    """Lists the operations that run while it is active, without those that only view or allocate.

    An operation of PyTorch is taken to launch one kernel and to move its inputs and outputs once: the least that it
    does. What an operation of ours moves within it, such as between its two kernels, is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self._versions: Counter[int] = Counter()
        self._held: dict[int, torch.UntypedStorage] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = function._schema.name.split("::")[1]
        given = dict(zip((x.name for x in function._schema.arguments), args, strict=False)) | dict(kwargs)
        written = {x.name for x in function._schema.arguments if x.is_write}
        unread = {x.name for x in function._schema.arguments if x.is_out} | (written if name in _ONLY_WRITES else set())
        reads = self._views([x for key, x in given.items() if key not in unread])
        inputs = {x.untyped_storage()._cdata for x in _tensors(given)}
        result = function(*args, **kwargs)
        changed = _tensors([given[key] for key in written if key in given])
        made = [x for x in _tensors(result) if x.untyped_storage()._cdata not in inputs]
        if name in _NO_LAUNCH or not (changed or made):
            self._views(made)
            return result
        for key in {x.untyped_storage()._cdata for x in changed}:
            self._versions[key] += 1
        is_recurrence = name.removesuffix("_backward") in _RECURRENCES
        kind = "products" if name in _PRODUCTS else "recurrence" if is_recurrence else "passes"
        self.operations.append(Operation(name, kind, _LAUNCHES.get(name, 1), reads, self._views([*changed, *made])))
        return result

    def _views(self, values: list[Any]) -> frozenset[View]:
        return frozenset(self._view(x) for x in _tensors(values) if x.numel())

    def _view(self, x: Tensor) -> View:
        storage = x.untyped_storage()
        key = storage._cdata
        self._held[key] = storage  # so that no other storage gets the same address
        shape = tuple(size for size, stride in zip(x.shape, x.stride(), strict=True) if stride)
        content = Content(key, self._versions[key], storage.nbytes())
        return View(content, int(x.storage_offset()), shape, prod(shape) * x.itemsize)


def trace_step(base: Base, config: TrainConfig) -> list[Operation]:
    """The operations of the forward and the backward pass of a micro-batch; of the head's, those of two pieces alone
    (`rwkv_miss.ops.log_probs`).

    Raises:
        UserError: a setting does not fit the base.
    """
    model = model_of(base, config)
    with Trace() as trace, WithoutValues():
        log_probs, _ = batch_log_probs(model, batch_of(config), None, config.chunk_len)
        (-log_probs).backward()
    return trace.operations


def fused(operations: Sequence[Operation]) -> list[Operation]:
    """The same step with the fewest passes: all that happens between one matrix product or recurrence and the next is
    one kernel, which reads each tensor once.

    Products and recurrences stay as they are, in one kernel each. Of what passes make, that is written which a product
    or a recurrence reads, which nothing reads (a result), and which a pass after a further product reads if it depends
    on more than one tensor that is written; everything else is computed again where it is read. Passes are one kernel
    if as many products and recurrences come before them, on the longest way.
    """
    depth: dict[Content, int] = {}
    last_read: dict[Content, int] = {}
    for op in operations:
        level = max((depth.get(x.content, 0) for x in op.reads), default=0)
        last_read |= {x.content: max(last_read.get(x.content, 0), level) for x in op.reads}
        depth |= {x.content: level + (op.kind != "passes") for x in op.writes}
    multiplied = {x.content for op in operations if op.kind != "passes" for x in op.reads}
    sources: dict[Content, frozenset[View]] = {}
    """By what passes make and do not write: what it is computed from, all of it written."""
    found: list[Operation] = []
    kernels: dict[int, tuple[set[View], set[View]]] = {}
    for op in operations:
        if op.kind != "passes":
            found.append(replace(op, launches=1))
            continue
        needed = frozenset().union(*(sources.get(x.content, {x}) for x in op.reads))
        depends_on_several = len({x.content for x in needed}) > 1
        for x in op.writes:
            is_read_later = last_read.get(x.content, 0) > depth[x.content]
            if x.content in multiplied or x.content not in last_read or (is_read_later and depends_on_several):
                reads, writes = kernels.setdefault(depth[x.content], (set(), set()))
                reads |= needed
                writes.add(x)
            else:
                sources[x.content] = needed
    for level, (reads, writes) in sorted(kernels.items()):
        made_inside = {x.content for x in writes}
        outside = frozenset(x for x in reads if x.content not in made_inside)
        found.append(Operation(f"passes at depth {level}", "passes", 1, outside, frozenset(writes)))
    return found


def _tensors(values: Any) -> list[Tensor]:
    return [x for x in tree_leaves(values) if isinstance(x, Tensor)]


def _bytes(views: Iterable[View]) -> int:
    """Of each storage no more than it has, where views of it overlap."""
    sizes: Counter[Content] = Counter()
    for x in views:
        sizes[x.content] += x.bytes
    return sum(min(size, content.size) for content, size in sizes.items())
