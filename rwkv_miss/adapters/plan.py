"""What of a model is trained, decided from the settings and the shapes of the base's parameters alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

import torch

from rwkv_miss.adapters import whole
from rwkv_miss.adapters.method import LinearMethod, Method, find_methods, linear_methods
from rwkv_miss.config import ALL_LINEAR, AdapterConfig, ModelConfig
from rwkv_miss.errors import UserError
from rwkv_miss.model.versions import MODELS

_T = TypeVar("_T")


class Beside(NamedTuple):
    """What goes beside a linear. config: the settings with the linear's own `method` and `r`."""

    method: LinearMethod
    config: AdapterConfig


@dataclass(frozen=True)
class Plan:
    """linears: the path of each adapted linear -> what goes beside it. whole: the checkpoint key of each
    base parameter and each layer's learned state that is trained directly -> the method that trains it. Both are in the
    order of the base's parameters; states that the base lacks come last."""

    linears: dict[str, Beside]
    whole: dict[str, Method]

    def method_of(self, key: str) -> Method:
        """The method that trains the tensor `key`: a checkpoint key, or a linear's path and a tensor's name."""
        if key in self.whole:
            return self.whole[key]
        return next(beside.method for path, beside in self.linears.items() if key.startswith(path + "."))


def make_plan(config: AdapterConfig, sizes: ModelConfig, shapes: Mapping[str, torch.Size]) -> Plan:
    """What `config` trains of a model.

    Args:
        shapes: the shapes of the base's parameters by checkpoint key; a learned state that the base has is included.

    Raises:
        UserError: a name in the settings matches nothing, or a method cannot go beside a linear.
    """
    methods = find_methods(config.method)
    if sum(isinstance(method, LinearMethod) for method in methods) > 1:
        raise UserError(
            f"adapter.method is {config.method!r}: only one of its methods can go beside linears; choose one, and give "
            "the other in method_pattern"
        )
    beside_linears = linear_methods(config)
    if odd := [name for name in (config.method_pattern or {}).values() if name not in beside_linears]:
        raise UserError(f"adapter.method_pattern gives method {odd[0]}, which does not go beside linears")
    paths = _targets(config, linear_shapes(sizes, shapes)) if beside_linears else []
    linears = {path: beside(config, path) for path in paths}
    trained: dict[str, Method] = {}
    for method in methods:
        trained |= dict.fromkeys(method.keys(sizes, shapes.keys()), method)
    if twice := [key for key in trained if key.removesuffix(".weight") in linears]:
        raise UserError(f"adapter.method is {config.method!r}, which would train {twice[0]} in two ways; choose one")
    chosen = _modules_to_save(config.modules_to_save or [], shapes, linears)
    for path, (linear_method, own) in linears.items():
        out_features, in_features = shapes[f"{path}.weight"]
        if reason := linear_method.refuses(in_features, out_features, own):
            raise UserError(f"{path}: {reason}")
    base = {key: whole.METHOD for key in chosen} | {key: m for key, m in trained.items() if key in shapes}
    rest = {key: method for key, method in trained.items() if key not in shapes}
    return Plan(linears, {key: base[key] for key in shapes if key in base} | rest)


def linear_shapes(sizes: ModelConfig, shapes: Mapping[str, torch.Size]) -> dict[str, torch.Size]:
    """The linears that an adapter may go beside, by their paths, and the shapes (out, in) of their weights."""
    ends = tuple(f".{name}.weight" for name in MODELS[sizes.version].linears)
    return {key.removesuffix(".weight"): shape for key, shape in shapes.items() if key.endswith(ends)}


def select(config: AdapterConfig, paths: Iterable[str]) -> list[str]:
    """Those of the linears `paths` that the settings choose, in order."""
    found = [path for path in paths if _is_meant(path, config.target_modules or ALL_LINEAR)]
    if config.exclude_modules:
        found = [path for path in found if not _is_meant(path, config.exclude_modules)]
    if config.layers_to_transform is not None:
        layers = _layers(config)
        found = [path for path in found if _layer(path, config.layers_pattern) in layers]
    return found


def beside(config: AdapterConfig, path: str) -> Beside:
    """What the settings put beside the linear `path`, one of `select`."""
    name = _by_pattern(config.method_pattern, path, next(iter(linear_methods(config))))
    [method] = find_methods(name)
    assert isinstance(method, LinearMethod), name
    return Beside(method, replace(config, method=name, r=_by_pattern(config.rank_pattern, path, config.r)))


def _is_meant(path: str, names: list[str] | str) -> bool:
    """Whether a linear is meant by `names`: by an entry that is its path or the path's end after a dot, or by a regular
    expression for the whole path."""
    if isinstance(names, str):
        return names.lower() == ALL_LINEAR or bool(re.fullmatch(names, path))
    return any(path == name or path.endswith("." + name) for name in names)


def _by_pattern(pattern: Mapping[str, _T] | None, path: str, default: _T) -> _T:
    """The value of the first expression that matches the path, or its end after a dot."""
    return next((v for expression, v in (pattern or {}).items() if _matches_end(expression, path)), default)


def _matches_end(expression: str, path: str) -> bool:
    return bool(re.fullmatch(rf"(.*\.)?({expression})", path))


def _layers(config: AdapterConfig) -> list[int]:
    chosen = config.layers_to_transform
    return [chosen] if isinstance(chosen, int) else chosen or []


def _layer(path: str, pattern: str | None) -> int | None:
    """The number of the layer that a linear belongs to: the first that follows what `pattern` matches."""
    found = re.match(rf"(?:.*?\.)??(?:{pattern or '[^.]*'})\.(\d+)\.", path)
    return int(found[1]) if found else None


def _targets(config: AdapterConfig, linears: Mapping[str, torch.Size]) -> list[str]:
    """`select`, where every name and pattern must mean something."""
    there = ", ".join(dict.fromkeys(re.sub(r"^blocks\.\d+\.", "", path) for path in linears))
    for setting in ("target_modules", "exclude_modules"):
        names = getattr(config, setting) or []
        for name in [names] if isinstance(names, str) else names:
            if not any(_is_meant(path, names if isinstance(names, str) else [name]) for path in linears):
                why = {
                    ALL_LINEAR: f"; give {ALL_LINEAR} by itself, not in a list, to adapt all of them",
                    "head": "; to train the head itself, give modules_to_save [head]",
                    "emb": "; to train the embedding itself, give modules_to_save [emb]",
                }.get(name, "")
                raise UserError(f"adapter.{setting}: {name} matches no linear; there are: {there}{why}")
    found = select(replace(config, layers_to_transform=None), linears)
    if config.layers_to_transform is not None:
        layers = {_layer(path, config.layers_pattern) for path in found}
        if missing := [layer for layer in _layers(config) if layer not in layers]:
            raise UserError(
                f"adapter.layers_to_transform: there is no layer {missing[0]} among the linears chosen"
                + (f" whose names have {config.layers_pattern} before the number" if config.layers_pattern else "")
            )
        found = select(config, linears)
    if not found:
        raise UserError("adapter.exclude_modules excludes every linear that target_modules means")
    for setting in ("rank_pattern", "method_pattern"):
        for expression in getattr(config, setting) or {}:
            if not any(_matches_end(expression, path) for path in found):
                raise UserError(f"adapter.{setting}: {expression} matches none of the linears chosen")
    return found


def _modules_to_save(names: list[str], shapes: Mapping[str, torch.Size], linears: Mapping[str, Beside]) -> list[str]:
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
