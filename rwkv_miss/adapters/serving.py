"""Many adapters beside one model at the same time: each sequence of a batch runs with one of them, or with none.

What an adapter adds to a linear's result must be a product: y = W x + S D, where S is x A, or in MiSS the sums over x's
blocks. W x and the sums over blocks are those of all sequences together, whatever their adapters. The model's own
linears stay where they are; hooks add to their results.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from rwkv_miss.adapters.files import AdapterFile, check_fits, read_adapter
from rwkv_miss.adapters.inject import base_shapes, refuse_second
from rwkv_miss.adapters.method import name_of
from rwkv_miss.adapters.miss import METHOD as MISS
from rwkv_miss.adapters.plan import Plan
from rwkv_miss.adapters.stacks import Form, Part, Rows, Stacks
from rwkv_miss.errors import UserError
from rwkv_miss.model.base import RWKV
from rwkv_miss.model.initial_state import is_state, state_shapes
from rwkv_miss.model.linear import FrozenLinear
from rwkv_miss.model.state import State

_MERGE = "merge it into the base (rwkv-miss merge) and serve the merged model"


@dataclass(eq=False)
class Served:
    """An adapter that can be chosen, or that has been removed while sequences run with it.

    slots: where its tensors lie in the stacks of each form.
    state: of one sequence, which sequences begin from; None is the model's own.
    users: how many sequences run with it.
    """

    name: str
    slots: dict[Form, int]
    state: State | None
    users: int = 0
    is_removed: bool = False


class Adapters:
    """The adapters of a model. They may be added and removed between any two of its calls.

    Args:
        model: a base without an adapter in use.
        on_remove: called with each adapter that is removed.
    """

    def __init__(self, model: RWKV, on_remove: Callable[[Served], None]) -> None:
        self._model = model
        self._on_remove = on_remove
        self._served: dict[str, Served] = {}
        self._stacks: dict[Form, Stacks] = {}
        self._hooked: set[str] = set()
        self._rows: dict[Form, Rows] = {}  # of the call of the model that is in progress

    def names(self) -> list[str]:
        return list(self._served)

    def add(self, name: str, folder: str | os.PathLike) -> None:
        """Reads an adapter, which can then be chosen by its name.

        Args:
            folder: an adapter folder, or a run's folder, whose `adapter` is used.

        Raises:
            UserError: there is an adapter of that name, the folder cannot be read or does not fit the model, or what it
                holds cannot be served beside others. Nothing is changed then.
        """
        if name in self._served:
            raise UserError(f"there is an adapter already whose name is {name!r}; remove it, or choose another name")
        refuse_second(self._model)
        file = read_adapter(folder)
        model = self._model
        plan = check_fits(file, model.config, base_shapes(model), model.fingerprint, folder)
        if trained := [key for key in plan.whole if not is_state(key)]:
            raise UserError(
                f"{folder}: the adapter has trained {trained[0]}, a part of the base itself, of which all sequences of "
                f"a batch have the same; {_MERGE}"
            )
        slots = {}
        for form, parts in _parts(model, file, plan, folder).items():
            slots[form] = self._stacks.setdefault(form, Stacks(form)).put(parts, model.emb.weight)
        for path in plan.linears.keys() - self._hooked:
            model.get_submodule(path).register_forward_hook(partial(self._add_to, path))
            self._hooked.add(path)
        self._served[name] = Served(name, slots, _state(model, file))

    def remove(self, name: str) -> None:
        """The adapter can no longer be chosen. Sequences that run with it go on with it to their ends; its memory is
        used for others after that.

        Raises:
            UserError: there is no adapter of that name.
        """
        adapter = self.find(name)
        del self._served[name]
        adapter.is_removed = True
        self._on_remove(adapter)
        self._free_unused(adapter)

    def find(self, name: str) -> Served:
        """UserError where there is no adapter of that name."""
        if name not in self._served:
            there = f"there are: {', '.join(self._served)}" if self._served else "there are none"
            raise UserError(f"there is no adapter whose name is {name!r}; {there}")
        return self._served[name]

    def begin(self, adapter: Served | None) -> None:
        """A sequence will run with the adapter until `end` is called."""
        if adapter:
            adapter.users += 1

    def end(self, adapter: Served | None) -> None:
        if adapter:
            adapter.users -= 1
            self._free_unused(adapter)

    @contextmanager
    def acting(self, rows: Sequence[Served | None]) -> Iterator[None]:
        """In this context the model's calls, without gradients, are of a batch whose rows have these adapters."""
        if any(rows):
            for form, stacks in self._stacks.items():
                slots = [adapter.slots.get(form) if adapter else None for adapter in rows]
                if found := stacks.rows(slots, self._model.emb.weight.device):
                    self._rows[form] = found
        try:
            yield
        finally:
            self._rows.clear()

    def _add_to(self, path: str, linear: nn.Module, inputs: tuple[Tensor], y: Tensor) -> None:
        """The hook of a linear."""
        for form, rows in self._rows.items():
            self._stacks[form].add_to(y, path, inputs[0], rows)

    def _free_unused(self, adapter: Served) -> None:
        if adapter.is_removed and not adapter.users:
            for form, slot in adapter.slots.items():
                self._stacks[form].free(slot)


def _parts(model: RWKV, file: AdapterFile, plan: Plan, folder: str | os.PathLike) -> dict[Form, dict[str, Part]]:
    """What the adapter adds beside each linear, by form and path.

    Raises:
        UserError: a method's change of the weight is no product.
    """
    found: dict[Form, dict[str, Part]] = {}
    tensors = file.linears
    for path, (method, own) in plan.linears.items():
        linear = model.get_submodule(path)
        assert isinstance(linear, FrozenLinear), path
        shape = torch.Size((linear.out_features, linear.in_features))
        product = method.factors(tensors[path], shape, own, exact=False)
        if product is None:
            raise UserError(
                f"{folder}: {path} has an adapter of method {name_of(method)}, which changes the weight by more than a "
                f"product of two thin matrices and cannot be served beside others; {_MERGE}"
            )
        if blocks := MISS.from_factors(product, own):
            part = Part(blocks[0]["miss_block"], None)
        else:
            part = Part(product.B.T, product.A.T)
        found.setdefault(Form(len(part.D), part.A is None), {})[path] = part
    return found


def _state(model: RWKV, file: AdapterFile) -> State | None:
    """The state that the adapter has learned, for one sequence; None where it has learned none."""
    layers = [file.tensors[key] for key in state_shapes(model.config) if key in file.tensors]
    if not layers:
        return None
    shift = torch.zeros(len(layers), 1, model.config.n_embd)
    like = model.emb.weight
    return State(shift, torch.stack(layers).unsqueeze(1), shift, model.config.version).to(like.device, like.dtype)
