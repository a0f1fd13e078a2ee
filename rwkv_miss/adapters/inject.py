"""Puts what is trained into a model: adapters beside its linears, its initial state, its own parameters."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from rwkv_miss.adapters.method import check
from rwkv_miss.adapters.plan import Plan, make_plan
from rwkv_miss.adapters.whole import train_whole
from rwkv_miss.config import AdapterConfig
from rwkv_miss.errors import UserError
from rwkv_miss.model.base import RWKV
from rwkv_miss.model.initial_state import add_initial_state, has_initial_state, is_state
from rwkv_miss.model.linear import FrozenLinear
from rwkv_miss.model.quantised import QuantLinear, refuse_training
from rwkv_miss.model.recognise import parameter_shapes

DEFAULT = "default"
"""The name of an adapter that is given none."""


@dataclass(frozen=True)
class InUse:
    """What stands in a model where the base's own parts stood.

    modules: those in linears' places, by the linears' paths.
    whole: the tensors of the base's parameters and states that have other values, by key.
    base: what stood in these places before: a module, a parameter, or None.
    """

    modules: dict[str, nn.Module]
    whole: dict[str, Tensor]
    base: dict[str, nn.Module | nn.Parameter | None]


@dataclass(frozen=True)
class Installed(InUse):
    """What `inject` or `load_adapter` has put into a model, and what it was asked for."""

    config: AdapterConfig
    plan: Plan


def inject(model: RWKV, config: AdapterConfig, masters: Mapping[str, Tensor] | None = None) -> RWKV:
    """Freezes the model and adds what `config` trains, in place. Adapters and states start so that the model's results
    stay the same, with most methods to the bit; with a state, those of packed documents up to rounding, since each
    document is then run as a sequence of its own. What is random is drawn by torch's own generator.

    Args:
        masters: the base's tensors in the precision of its file, by key: the values that trained parameters of the base
            start from. None: the model's own values, which may have been rounded when it was loaded.

    Raises:
        UserError: a setting is wrong, a name matches nothing, a method cannot go beside a linear, or the model has
            an adapter already.
    """
    check(config)
    refuse_second(model)
    plan = make_plan(config, model.config, base_shapes(model))
    install(model, config, plan, masters)
    for path, (method, own) in plan.linears.items():
        method.start(model.get_submodule(path), own)
    return model


def install(
    model: RWKV,
    config: AdapterConfig,
    plan: Plan,
    masters: Mapping[str, Tensor] | None = None,
    name: str = DEFAULT,
) -> None:
    """Freezes the model, then replaces the linears in `plan.linears` by their adapters and makes `plan.whole`
    trainable. If a learned state is to be trained and the model has none, one is added."""
    refuse_training(plan.whole, [name for name, m in model.named_modules() if isinstance(m, QuantLinear)])
    model.requires_grad_(False)
    modules = {}
    for path, (method, own) in plan.linears.items():
        linear = model.get_submodule(path)
        assert isinstance(linear, FrozenLinear), path
        modules[path] = method.wrap(linear, own)
    base = standing(model, [*plan.linears, *plan.whole])
    if any(map(is_state, plan.whole)) and not has_initial_state(model):
        add_initial_state(model)
    whole = {key: (masters or {}).get(key, model.get_parameter(key).data) for key in plan.whole}
    adapter = Installed(modules, whole, base, config, plan)
    put_in(model, adapter)
    model.adapters = {**model.adapters, name: adapter}


def put_in(model: RWKV, adapter: InUse) -> None:
    """Puts an adapter into a model that has none in use."""
    for path, module in adapter.modules.items():
        # Neither the mode nor the device of a module that was not in the model is the model's: a new one is in training
        # mode, so that its dropout would act in an eval model.
        setattr(*_place(model, path), module.train(model.training).to(model.emb.weight.device))
    if any(map(is_state, adapter.whole)) and not has_initial_state(model):
        add_initial_state(model)
    train_whole(model, adapter.whole, adapter.whole)
    model.adapter = adapter


def take_out(model: RWKV) -> InUse | None:
    """Puts the base's own linears and parameters back, to the bit, since adapters write to none of them. Returns what
    was in use, for `put_in`.

    Raises:
        UserError: parameters of the base are trained where they were, which `inject` does to save memory.
    """
    adapter = model.adapter
    if adapter is None:
        return None
    assert isinstance(adapter, InUse)
    now = {checkpoint_key(name): p.data for name, p in model.named_parameters()}
    for key in adapter.whole:
        if isinstance(before := adapter.base[key], nn.Parameter) and before.data_ptr() == now[key].data_ptr():
            raise UserError(f"{key} has been trained in its place; save the adapter and load it onto a fresh base")
    adapter.whole.update({key: now[key] for key in adapter.whole})
    for path, before in adapter.base.items():
        module, name = _place(model, path)
        if parametrize.is_parametrized(module, name):
            parametrize.remove_parametrizations(module, name, leave_parametrized=False)
        setattr(module, name, before)
    model.adapter = None
    return adapter


def standing(model: RWKV, places: Iterable[str]) -> dict[str, Any]:
    """What stands in a model at each path or key: a module, a parameter, or None."""
    return {path: getattr(*_place(model, path)) for path in places}


def _place(model: RWKV, path: str) -> tuple[nn.Module, str]:
    """The module that has `path` as an attribute, and the attribute's name."""
    parent, _, name = path.rpartition(".")
    return model.get_submodule(parent), name


def base_shapes(model: RWKV) -> dict[str, torch.Size]:
    """The shapes of what a model without an adapter has of its base, by checkpoint key, quantised weights included."""
    return parameter_shapes(model.config) | {name: p.shape for name, p in model.named_parameters()}


def refuse_second(model: RWKV) -> None:
    """UserError where the model has an adapter already."""
    if model.adapters:
        raise UserError("the model has an adapter already; load the base again for another")


def installed(model: RWKV) -> Installed:
    """What has been put into the model.

    Raises:
        UserError: the model has no adapter.
    """
    if not isinstance(model.adapter, Installed):
        raise UserError("the model has no adapter to save; call inject first")
    return model.adapter


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters by key, in the model's order. The key of a base parameter or a learned state is that in
    a checkpoint; the key of an adapter's parameter is its linear's path and its name in `LinearMethod.names`."""
    return {checkpoint_key(name): p for name, p in model.named_parameters() if p.requires_grad}


def held_tensors(model: RWKV) -> dict[str, Tensor]:
    """All that a run's results depend on beyond the frozen base, by key: the trained parameters, and the buffers of the
    modules beside linears."""
    buffers = {
        f"{path}.{name}": buffer
        for path in installed(model).plan.linears
        for name, buffer in model.get_submodule(path).named_buffers(recurse=False)
    }
    return trained_parameters(model) | buffers


def checkpoint_key(name: str) -> str:
    """The checkpoint's key for `name`, a parameter's name in the model. The two differ if the parameter is cast
    (`train_whole`) or belongs to a linear that a method has wrapped."""
    return re.sub(r"parametrizations\.(\w+)\.original$", r"\1", name).replace(".base_layer.", ".")
