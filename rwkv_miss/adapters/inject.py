"""Puts what is trained into a model: adapters beside its linears, its initial state, its own parameters."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

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


@dataclass(frozen=True)
class Installed:
    """What `inject` or `load_adapter` has put into a model."""

    config: AdapterConfig
    plan: Plan


def inject(model: RWKV, config: AdapterConfig, masters: Mapping[str, Tensor] | None = None) -> RWKV:
    """Freezes the model and adds what `config` trains, in place. Adapters and states start at zero, so the model's
    results stay the same, to the bit; with a state, those of packed documents up to rounding, since each document is
    then run as a sequence of its own.

    Args:
        masters: the base's tensors in the precision of its file, by key: the values that trained parameters of the base
            start from. None: the model's own values, which may have been rounded when it was loaded.

    Raises:
        UserError: a setting is wrong, a name matches nothing, a method cannot go beside a linear, or the model has
            an adapter already.
    """
    check(config)
    refuse_second(model)
    install(model, config, make_plan(config, model.config, base_shapes(model)), masters)
    return model


def install(model: RWKV, config: AdapterConfig, plan: Plan, masters: Mapping[str, Tensor] | None = None) -> None:
    """Freezes the model, then replaces the linears in `plan.linears` by their adapters and makes `plan.whole`
    trainable. If a learned state is to be trained and the model has none, one is added."""
    refuse_training(plan.whole, [name for name, m in model.named_modules() if isinstance(m, QuantLinear)])
    model.requires_grad_(False)
    for path, method in plan.linears.items():
        parent, _, name = path.rpartition(".")
        linear = model.get_submodule(path)
        assert isinstance(linear, FrozenLinear), path
        wrapped = method.wrap(linear, config)
        wrapped.train(linear.training)  # a new module is in training mode: its dropout would act in an eval model
        setattr(model.get_submodule(parent), name, wrapped)
    if any(map(is_state, plan.whole)) and not has_initial_state(model):
        add_initial_state(model)
    train_whole(model, plan.whole, masters)
    model.adapter = Installed(config, plan)


def base_shapes(model: RWKV) -> dict[str, torch.Size]:
    """The shapes of what a model without an adapter has of its base, by checkpoint key, quantised weights included."""
    return parameter_shapes(model.config) | {name: p.shape for name, p in model.named_parameters()}


def refuse_second(model: RWKV) -> None:
    """UserError where the model has an adapter already."""
    if model.adapter is not None:
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


def checkpoint_key(name: str) -> str:
    """The checkpoint's key for `name`, a parameter's name in the model. The two differ if the parameter is cast
    (`train_whole`) or belongs to a linear that a method has wrapped."""
    return re.sub(r"parametrizations\.(\w+)\.original$", r"\1", name).replace(".base_layer.", ".")
