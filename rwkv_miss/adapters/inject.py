"""Chooses what of a model is trained: adapters beside its linears, its initial state, its own parameters."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from rwkv_miss.adapters.full import matches, train_whole
from rwkv_miss.adapters.miss import MissLinear
from rwkv_miss.config import AdapterConfig, check
from rwkv_miss.errors import UserError
from rwkv_miss.model.initial_state import add_initial_state, has_initial_state, is_state, state_shapes


def inject(model: nn.Module, config: AdapterConfig) -> nn.Module:
    """Freezes the model and adds what `config` trains, in place. Adapters and states start at zero: the model computes
    what it did, to the bit (packed documents, which a state makes sequences of their own: to rounding).

    Raises:
        UserError: a setting is wrong, a name matches nothing, r is larger than a linear's input, or the model has
            an adapter already.
    """
    check(config)
    refuse_second(model)
    methods = config.method.split("+")
    parameters = [name for name, _ in model.named_parameters()]
    ranks = {name: config.r for name in _targets(model, config)} if "miss" in methods else {}
    keys = parameters if "full" in methods else _chosen(parameters, config.modules_to_save or [], ranks)
    if "state" in methods:
        keys = [*keys, *state_shapes(model.config)]
    install(model, ranks, config.dropout, keys)
    model.adapter_config = config
    return model


def install(model: nn.Module, ranks: dict[str, int], dropout: float, keys: Collection[str]) -> None:
    """Freezes the model, then replaces each linear named in `ranks` by a `MissLinear` of that rank and trains the
    parameters of `keys`; those of a learned state are added to a model that has none."""
    for name, r in ranks.items():
        if r > (n := model.get_submodule(name).in_features):
            raise UserError(f"{name}: r is {r} but the linear has only {n} inputs; lower adapter.r")
    model.requires_grad_(False)
    for name, r in ranks.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, MissLinear(model.get_submodule(name), r, dropout))
    if any(map(is_state, keys)) and not has_initial_state(model):
        add_initial_state(model)
    train_whole(model, keys)


def refuse_second(model: nn.Module) -> None:
    if hasattr(model, "adapter_config"):
        raise UserError("the model has an adapter already; load the base again for another")


def adapters(model: nn.Module) -> dict[str, MissLinear]:
    """The adapted linears by the path of their module, in the model's order."""
    return {name: m for name, m in model.named_modules() if isinstance(m, MissLinear)}


def _targets(model: nn.Module, config: AdapterConfig) -> list[str]:
    linears = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    targets = config.target_modules or list(model.linears)
    matched = {t: [n for n in linears if n != "head" and (n == t or n.endswith("." + t))] for t in targets}
    if unmatched := [t for t, names in matched.items() if not names]:
        raise UserError(
            f"adapter.target_modules: {', '.join(unmatched)} matches no linear; there are: {', '.join(model.linears)}"
        )
    names = {n for found in matched.values() for n in found}
    return [n for n in linears if n in names]


def _chosen(parameters: list[str], names: list[str], adapted: Collection[str]) -> list[str]:
    """The parameters that `modules_to_save` means."""
    for name in names:
        found = [key for key in parameters if matches(key, name)]
        if not found:
            raise UserError(
                f"adapter.modules_to_save: {name} matches no part of the model; give ln, time, emb, head or the end of "
                "a name such as ln_out or att.w0"
            )
        if twice := [key for key in found if key.removesuffix(".weight") in adapted]:
            raise UserError(
                f"adapter.modules_to_save: {name} means {twice[0]}, which MiSS adapts; leave its linear out of "
                "target_modules to train it whole"
            )
    return [key for key in parameters if any(matches(key, name) for name in names)]
