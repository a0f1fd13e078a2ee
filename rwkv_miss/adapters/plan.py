"""What of a model is trained, decided from the settings and the shapes of the base's parameters alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from rwkv_miss.adapters import whole
from rwkv_miss.adapters.method import LinearMethod, Method, find_methods
from rwkv_miss.config import AdapterConfig, ModelConfig
from rwkv_miss.errors import UserError
from rwkv_miss.model.versions import MODELS


@dataclass(frozen=True)
class Plan:
    """linears: the path of each adapted linear -> the method that goes beside it. whole: the checkpoint key of each
    base parameter and each layer's learned state that is trained directly -> the method that trains it. Both are in the
    order of the base's parameters; states that the base lacks come last."""

    linears: dict[str, LinearMethod]
    whole: dict[str, Method]

    def method_of(self, key: str) -> Method:
        """The method that trains the tensor `key`: a checkpoint key, or a linear's path and a tensor's name."""
        if key in self.whole:
            return self.whole[key]
        return next(method for path, method in self.linears.items() if key.startswith(path + "."))


def make_plan(config: AdapterConfig, sizes: ModelConfig, shapes: Mapping[str, torch.Size]) -> Plan:
    """What `config` trains of a model.

    Args:
        shapes: the shapes of the base's parameters by checkpoint key; a learned state that the base has is included.

    Raises:
        UserError: a name in the settings matches nothing, or a method cannot go beside a linear.
    """
    methods = find_methods(config.method)
    linears: dict[str, LinearMethod] = {}
    for method in methods:
        if isinstance(method, LinearMethod):
            if linears:
                raise UserError(
                    f"adapter.method is {config.method!r}: only one of its methods can go beside linears; choose one"
                )
            linears = dict.fromkeys(_targets(config, sizes, shapes), method)
    trained: dict[str, Method] = {}
    for method in methods:
        trained |= dict.fromkeys(method.keys(sizes, shapes.keys()), method)
    if twice := [key for key in trained if key.removesuffix(".weight") in linears]:
        raise UserError(f"adapter.method is {config.method!r}, which would train {twice[0]} in two ways; choose one")
    chosen = _modules_to_save(config.modules_to_save or [], shapes, linears)
    for path, linear_method in linears.items():
        out_features, in_features = shapes[f"{path}.weight"]
        if reason := linear_method.refuses(in_features, out_features, config):
            raise UserError(f"{path}: {reason}")
    base = {key: whole.METHOD for key in chosen} | {key: m for key, m in trained.items() if key in shapes}
    rest = {key: method for key, method in trained.items() if key not in shapes}
    return Plan(linears, {key: base[key] for key in shapes if key in base} | rest)


def linear_shapes(sizes: ModelConfig, shapes: Mapping[str, torch.Size]) -> dict[str, torch.Size]:
    """The linears that an adapter may go beside, by their paths, and the shapes (out, in) of their weights."""
    ends = tuple(f".{name}.weight" for name in MODELS[sizes.version].linears)
    return {key.removesuffix(".weight"): shape for key, shape in shapes.items() if key.endswith(ends)}


def is_target(path: str, name: str) -> bool:
    """Whether the entry `name` of `target_modules` means the linear `path`: it is the path, or its end after a dot."""
    return path == name or path.endswith("." + name)


def _targets(config: AdapterConfig, sizes: ModelConfig, shapes: Mapping[str, torch.Size]) -> list[str]:
    linears = linear_shapes(sizes, shapes)
    if config.target_modules is None:
        return list(linears)
    for name in config.target_modules:
        if not any(is_target(path, name) for path in linears):
            there = ", ".join(MODELS[sizes.version].linears)
            why = {
                "all-linear": "; leave target_modules out to adapt all of them",
                "head": "; to train the head itself, give modules_to_save [head]",
                "emb": "; to train the embedding itself, give modules_to_save [emb]",
            }.get(name, "")
            raise UserError(f"adapter.target_modules: {name} matches no linear; there are: {there}{why}")
    return [path for path in linears if any(is_target(path, name) for name in config.target_modules)]


def _modules_to_save(
    names: list[str], shapes: Mapping[str, torch.Size], linears: Mapping[str, LinearMethod]
) -> list[str]:
    """The keys that `modules_to_save` means."""
    for name in names:
        found = [key for key in shapes if whole.matches(key, name)]
        if not found:
            raise UserError(
                f"adapter.modules_to_save: {name} matches no part of the model; give ln, time, emb, head or the end of "
                "a name such as ln_out or att.w0"
            )
        if twice := [key for key in found if key.removesuffix(".weight") in linears]:
            raise UserError(
                f"adapter.modules_to_save: {name} means {twice[0]}, which gets an adapter already; leave its "
                "linear out of target_modules to train it whole"
            )
    return [key for key in shapes if any(whole.matches(key, name) for name in names)]
