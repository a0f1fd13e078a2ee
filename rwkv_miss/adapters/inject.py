"""Puts adapters beside a model's linears."""

from __future__ import annotations

from torch import nn

from rwkv_miss.adapters.miss import MissLinear
from rwkv_miss.config import AdapterConfig, check
from rwkv_miss.errors import UserError


def inject(model: nn.Module, config: AdapterConfig) -> nn.Module:
    """Freezes the model and puts an adapter beside each target linear, in place. The adapters start at zero: the
    model computes what it did, to the bit.

    Raises:
        UserError: a setting is wrong, a target matches no linear, r is larger than a linear's input, or the
            model has adapters already.
    """
    check(config)
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    targets = config.target_modules or list(model.linears)
    matched = {t: [n for n in linears if n != "head" and (n == t or n.endswith("." + t))] for t in targets}
    if any(isinstance(m, MissLinear) for m in model.modules()):
        raise UserError("the model has an adapter already; load the base again for another")
    if unmatched := [t for t, names in matched.items() if not names]:
        raise UserError(
            f"adapter.target_modules: {', '.join(unmatched)} matches no linear; there are: {', '.join(model.linears)}"
        )
    names = {n for found in matched.values() for n in found}
    inject_linears(model, {n: config.r for n in linears if n in names}, config.dropout)
    model.adapter_config = config
    return model


def inject_linears(model: nn.Module, ranks: dict[str, int], dropout: float) -> None:
    """Freezes the model and replaces each linear named in `ranks` by a `MissLinear` of that rank."""
    for name, r in ranks.items():
        if r > (n := model.get_submodule(name).in_features):
            raise UserError(f"{name}: r is {r} but the linear has only {n} inputs; lower adapter.r")
    model.requires_grad_(False)
    for name, r in ranks.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, MissLinear(model.get_submodule(name), r, dropout))


def adapters(model: nn.Module) -> dict[str, MissLinear]:
    """The adapted linears by the path of their module, in the model's order."""
    return {name: m for name, m in model.named_modules() if isinstance(m, MissLinear)}
