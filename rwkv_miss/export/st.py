"""The safetensors files of web-rwkv and what is built on it (Ai00, RWKV-Runner's WebGPU mode), as its
assets/scripts/convert_safetensors.py makes them and its src/runtime/loader.rs reads them: every tensor fp16, BlinkDL's
keys with a few other names for RWKV-6's, and the matrices of low rank transposed."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

from rwkv_miss.checkpoint import read_safetensors
from rwkv_miss.config import ModelConfig
from rwkv_miss.errors import UserError
from rwkv_miss.export.renamed import Place, swapped, write_renamed
from rwkv_miss.export.target import Target, Weights

_RENAMED = {".time_faaaa": ".time_first", ".time_maa": ".time_mix"}
_SWAPPED = re.compile(r"\.([wagv]|time_mix_w|time_decay_w)[12]$")


def name_of(key: str) -> str:
    """web-rwkv's name of the tensor with one of BlinkDL's keys."""
    for ours, theirs in _RENAMED.items():
        key = key.replace(ours, theirs)
    return key


def key_of(name: str) -> str:
    """The key whose `name_of` is that name."""
    for ours, theirs in _RENAMED.items():
        name = name.replace(theirs, ours)
    return name


def _place(key: str, shape: torch.Size) -> Place:
    name = name_of(key)
    return swapped(name, shape) if _SWAPPED.search(name) else Place(name, shape)


def _check_sizes(sizes: ModelConfig) -> None:
    if sizes.version == 7 and sizes.n_layer < 2:
        raise UserError("web-rwkv finds sizes in the second layer of an RWKV-7, and this one has one; use the .pth")


def _write(path: Path, weights: Weights) -> None:
    write_renamed(path, weights, {key: _place(key, spec.shape) for key, spec in weights.specs.items()})


def _read(path: Path) -> dict[str, Tensor]:
    found = read_safetensors(path)
    return {key_of(name): tensor.mT if _SWAPPED.search(name) else tensor for name, tensor in found.items()}


TARGET = Target(
    ".st",
    _write,
    _read,
    dtypes=("f16",),
    check_sizes=_check_sizes,
    uses={"Ai00, in assets/configs/Config.toml": ("toml", '[model]\npath = "."\nname = {out}')},
)
