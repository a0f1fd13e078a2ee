"""The safetensors files of web-rwkv and what is built on it (Ai00, RWKV-Runner's WebGPU mode), as its
assets/scripts/convert_safetensors.py makes them and its src/runtime/loader.rs reads them: every tensor fp16, BlinkDL's
keys with a few other names for RWKV-6's, and the matrices of low rank transposed."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

from rwkv_miss.checkpoint import read_safetensors
from rwkv_miss.errors import UserError
from rwkv_miss.export.renamed import Place, swapped, write_renamed
from rwkv_miss.export.target import Target, Weights, refuse_state

_RENAMED = {".time_faaaa": ".time_first", ".time_maa": ".time_mix"}
_SWAPPED = re.compile(r"\.([wagv]|time_mix_w|time_decay_w)[12]$")


def place_of(key: str, shape: torch.Size) -> Place:
    """Where the tensor of that key is in a file."""
    for old, new in _RENAMED.items():
        key = key.replace(old, new)
    return Place(key, swapped(shape), True) if _SWAPPED.search(key) else Place(key, shape)


def _write(path: Path, weights: Weights) -> None:
    refuse_state(path, weights)
    if weights.sizes.version == 7 and weights.sizes.n_layer < 2:
        raise UserError(f"{path}: web-rwkv reads sizes from RWKV-7's second layer, and this model has one layer")
    write_renamed(path, weights, place_of)


def _read(path: Path) -> dict[str, Tensor]:
    found = {}
    for name, stored in read_safetensors(path).items():
        key = name
        for old, new in _RENAMED.items():
            key = key.replace(new, old)
        found[key] = stored.mT if _SWAPPED.search(name) else stored
    return found


TARGET = Target(".st", _write, _read, dtypes=("f16",))
