"""Adapters in other forms: RWKV-PEFT's older files, and the same weights as another method's tensors."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from rwkv_miss.adapters.bat import METHOD as BAT
from rwkv_miss.adapters.files import AdapterFile, add_adapter, check_fits, peft_method, read_adapter, save_adapter
from rwkv_miss.adapters.inject import base_shapes
from rwkv_miss.adapters.method import METHODS, LinearMethod, find_methods, linear_methods, name_of
from rwkv_miss.adapters.miss import METHOD as MISS
from rwkv_miss.adapters.plan import Plan
from rwkv_miss.checkpoint import read_checkpoint
from rwkv_miss.config import AdapterConfig
from rwkv_miss.errors import UserError
from rwkv_miss.model.base import RWKV
from rwkv_miss.model.load import load_model

# The ends of the keys of RWKV-PEFT's blocks, under both names that the method had.
_OLD_NAME = re.compile(r"\.(disha|bone)$")
LAYOUTS = {"rwkv-peft": "input", "peft": "output"}
"""Who trained three-dimensional blocks -> what each of them goes with: a group of the linear's inputs, or outputs."""


def convert(
    base: str | os.PathLike,
    adapter: str | os.PathLike,
    out: str | os.PathLike,
    to: str | None = None,
    origin: str | None = None,
    ours: bool = False,
) -> RWKV:
    """Writes an adapter as a folder in HF PEFT's format.

    Args:
        base: the checkpoint that the adapter was trained on.
        adapter: a .pth of RWKV-PEFT's, with keys that end in .disha or .bone; or an adapter folder, ours or PEFT's.
        to: the name of the method whose tensors are written; None keeps the adapter's own.
        origin: one of `LAYOUTS`; needed for three-dimensional blocks in a .pth, whose shapes do not tell.
        ours: write what PEFT cannot hold too, as a folder that only this package reads.

    Returns:
        The base with the adapter that was written.

    Raises:
        UserError: the adapter cannot be read, does not fit the base, or has no exact form of that kind.
    """
    out = Path(out)
    if out.exists():
        raise UserError(f"{out}: exists already; give another name")
    if to is not None and to not in METHODS:
        raise UserError(f"there is no method {to!r} to convert to; this version has: {', '.join(METHODS)}")
    found = read_old(adapter, origin) if Path(adapter).is_file() else read_adapter(adapter)
    model = load_model(base)
    if to is not None:
        shapes = base_shapes(model)
        plan = check_fits(found, model.config, shapes, model.fingerprint, adapter)
        found = _as_method(found, plan, {path: shapes[f"{path}.weight"] for path in plan.linears}, to, adapter)
    add_adapter(model, found, adapter)
    if not ours and peft_method(model) is None:
        raise UserError(
            f"{adapter}: HF PEFT's format cannot hold it (a layout, or several methods or ranks, that PEFT does not "
            "have); give --ours true to write a folder that rwkv-miss alone reads"
        )
    save_adapter(model, out, {"converted_from": str(adapter)})
    return model


def read_old(path: str | os.PathLike, origin: str | None) -> AdapterFile:
    """Reads a .pth of RWKV-PEFT's: blocks beside linears, and whatever else was trained, by the base's keys.

    Raises:
        UserError: it is no such file, or its origin is needed and not given.
    """
    tensors = {key: tensor.float() for key, tensor in read_checkpoint(path).items()}
    blocks = {_OLD_NAME.sub("", key): tensor for key, tensor in tensors.items() if _OLD_NAME.search(key)}
    if not blocks:
        raise UserError(f"{path}: no key ends in .disha or .bone, so it is no adapter of RWKV-PEFT's")
    if len(kinds := {tensor.ndim for tensor in blocks.values()}) > 1 or not kinds <= {2, 3}:
        raise UserError(f"{path}: blocks of {sorted(kinds)} dimensions; expected all of 2, or all of 3")
    if kinds == {2}:
        method: LinearMethod = MISS
        options = {}
        ranks = {key: len(tensor) for key, tensor in blocks.items()}
    elif origin not in LAYOUTS:
        raise UserError(
            f"{path}: its blocks have three dimensions, each for a group of a linear's inputs (--origin rwkv-peft) or "
            f"of its outputs (--origin peft); origin is {origin!r}; say which program trained it"
        )
    else:
        method, options = BAT, {"layout": LAYOUTS[origin]}
        ranks = {key: tensor.shape[-1] for key, tensor in blocks.items()}
    rest = {key: tensor for key, tensor in tensors.items() if not _OLD_NAME.search(key)}
    config = AdapterConfig(
        name_of(method), target_modules=sorted(blocks), modules_to_save=sorted(rest) or None, options=options
    )
    _set_ranks(config, ranks)
    return AdapterFile(config, {f"{path}.{method.names[0]}": t for path, t in blocks.items()} | rest, None)


def _as_method(
    adapter: AdapterFile, plan: Plan, shapes: Mapping[str, torch.Size], to: str, source: str | os.PathLike
) -> AdapterFile:
    """The adapter with the tensors of another method beside its linears."""
    [method] = find_methods(to)
    if not isinstance(method, LinearMethod) or not plan.linears:
        raise UserError(f"{source}: a conversion is between methods that go beside linears")
    tensors, ranks = dict(adapter.whole), {}
    options: dict[str, Any] | None = None
    linears = adapter.linears
    for path, (before, own) in plan.linears.items():
        product = before.factors(linears[path], shapes[path], own)
        if product is None:
            raise UserError(f"{source}: {path}: what {own.method} adds is no product that fp32 can hold exactly")
        ranks[path] = len(product.A)
        if (found := method.from_factors(product, replace(own, method=to, r=ranks[path]))) is None:
            raise UserError(f"{source}: {path}: {to} has no exact form of what {own.method} adds")
        tensors |= {f"{path}.{name}": tensor for name, tensor in found[0].items()}
        if options not in (None, found[1]):
            raise UserError(f"{source}: {path}: {to} would need {found[1]} here and {options} elsewhere")
        options = found[1]
    names = adapter.config.method.split("+")
    linear = next(iter(linear_methods(adapter.config)))
    config = replace(
        adapter.config,
        method="+".join(to if name == linear else name for name in names),
        method_pattern=None,
        options=options or {},
    )
    _set_ranks(config, ranks)
    return AdapterFile(config, tensors, adapter.base_fingerprint)


def _set_ranks(config: AdapterConfig, ranks: dict[str, int]) -> None:
    [(config.r, _)] = Counter(ranks.values()).most_common(1)
    config.rank_pattern = {re.escape(path): r for path, r in ranks.items() if r != config.r} or None
