"""The sizes of the released models, and a base of which only the shapes are there."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rwkv_miss.checkpoint import read_checkpoint
from rwkv_miss.config import PlanConfig
from rwkv_miss.errors import UserError
from rwkv_miss.model.init import new_config
from rwkv_miss.model.load import running_dtype
from rwkv_miss.model.recognise import infer_config, parameter_shapes

_WIDTHS = {
    768: {"w": 64, "a": 64, "v": 32, "g": 128},
    1024: {"w": 64, "a": 64, "v": 32, "g": 128},
    2048: {"w": 96, "a": 96, "v": 64, "g": 256},
    2560: {"w": 96, "a": 96, "v": 64, "g": 320},
    4096: {"w": 128, "a": 128, "v": 96, "g": 480},
}
"""The widths of the low-rank matrices of released RWKV-7 models, by n_embd."""

SHAPES: dict[int, dict[str, tuple[int, int]]] = {
    7: {
        "0.1b": (12, 768),
        "0.4b": (24, 1024),
        "1.5b": (24, 2048),
        "2.9b": (32, 2560),
        "3b": (32, 2560),
        "7.2b": (32, 4096),
        "7b": (32, 4096),
        "13.3b": (61, 4096),
        "13b": (61, 4096),
    },
    6: {"1.6b": (24, 2048), "3b": (32, 2560), "7b": (32, 4096), "14b": (61, 4096)},
}
"""n_layer and n_embd of the models that BlinkDL has released, by version and name: RWKV-7 World (2.9B and below) and
G1, RWKV-6 World (huggingface.co/BlinkDL). All have heads of 64, and the World tokenizer's 65536 ids."""


@dataclass(frozen=True)
class Base:
    """A base of which only the shapes are there: its tensors on the meta device by key, in the dtype of its file, its
    number of layers, and the dtype that it runs in."""

    tensors: Mapping[str, Tensor]
    n_layer: int
    dtype: torch.dtype

    def with_layers(self, n_layer: int) -> Base:
        """The first layers of the base."""
        kept = {}
        for key, x in self.tensors.items():
            layer = re.match(r"blocks\.(\d+)\.", key)
            if layer is None or int(layer[1]) < n_layer:
                kept[key] = x
        return Base(kept, n_layer, self.dtype)


def find_base(config: PlanConfig) -> Base:
    """The released model `config.shape`, which is in bf16, or what is in the file `config.base`.

    Raises:
        UserError: there is no such model, or the file cannot be read or holds another one.
    """
    if config.shape:
        tensors = _released(config.shape.lower(), config.version)
    else:
        tensors = {key: torch.empty_like(t, device="meta") for key, t in read_checkpoint(config.base).items()}
    n_layer = infer_config(tensors, config.shape or config.base).n_layer
    return Base(tensors, n_layer, running_dtype(tensors, None if config.precision == "auto" else config.precision))


def _released(name: str, version: int) -> dict[str, Tensor]:
    if name not in SHAPES.get(version, {}):
        there = "; ".join(f"of RWKV-{version}: {', '.join(names)}" for version, names in SHAPES.items())
        raise UserError(f"shape is {name!r} of RWKV-{version}; there are {there}")
    n_layer, n_embd = SHAPES[version][name]
    config = new_config(version, n_layer, n_embd, 65536, low_rank=_WIDTHS[n_embd] if version == 7 else None)
    shapes = parameter_shapes(config)
    return {key: torch.empty(shape, dtype=torch.bfloat16, device="meta") for key, shape in shapes.items()}
