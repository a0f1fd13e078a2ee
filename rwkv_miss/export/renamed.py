"""Models in safetensors files under other names than BlinkDL's, some tensors in another shape or transposed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from rwkv_miss.checkpoint import TensorSpec, write_safetensors_in_pieces
from rwkv_miss.export.target import Weights


class Place(NamedTuple):
    """Where a file has a tensor.

    shape: there, with the same numbers in the same order, unless the last two dimensions are swapped.
    """

    name: str
    shape: torch.Size
    is_swapped: bool = False


def swapped(name: str, shape: torch.Size) -> Place:
    return Place(name, torch.Size((*shape[:-2], shape[-1], shape[-2])), True)


def write_renamed(path: Path, weights: Weights, places: Mapping[str, Place]) -> None:
    """Writes the tensors of the model that have a place, by their keys, one at a time."""
    keys = {place.name: key for key, place in places.items()}
    order = iter(weights.specs)

    def pieces(name: str) -> Iterable[Tensor]:
        key = keys[name]
        for without_place in takewhile(lambda found: found != key, order):
            weights.compute(without_place)  # each is asked for in its turn
        return [weights.compute(key).mT] if places[key].is_swapped else weights.pieces(key)

    specs = {place.name: TensorSpec(place.shape, weights.specs[key].dtype) for key, place in places.items()}
    write_safetensors_in_pieces(path, specs, pieces, {"format": "pt"})
