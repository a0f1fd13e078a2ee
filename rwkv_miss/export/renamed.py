"""Models in safetensors files under other names than BlinkDL's, some tensors in another shape or transposed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from rwkv_miss.checkpoint import TensorSpec, write_safetensors_in_pieces
from rwkv_miss.export.target import Weights


class Place(NamedTuple):
    """Where a file has a tensor.

    shape: there, of the same numbers in the same order, or with the last two dimensions swapped.
    """

    name: str
    shape: torch.Size
    is_swapped: bool = False

    def back(self, stored: Tensor, shape: torch.Size) -> Tensor:
        """The tensor of that shape, from what is stored at the place."""
        return stored.mT if self.is_swapped else stored.view(shape)


def swapped(shape: torch.Size) -> torch.Size:
    return torch.Size((*shape[:-2], shape[-1], shape[-2]))


def write_renamed(path: Path, weights: Weights, place: Callable[[str, torch.Size], Place | None]) -> None:
    """Writes the model, one tensor at a time, each where `place`, given its key and shape, puts it, if anywhere."""
    places = {key: place(key, spec.shape) for key, spec in weights.specs.items()}
    specs = {at.name: TensorSpec(at.shape, weights.specs[key].dtype) for key, at in places.items() if at}
    keys = iter(places.items())

    def pieces(name: str) -> Iterable[Tensor]:
        for key, at in keys:
            if at is not None:
                break
            weights.compute(key)  # every tensor is asked for in turn
        assert at is not None and at.name == name
        return [weights.compute(key).mT] if at.is_swapped else weights.pieces(key)

    write_safetensors_in_pieces(path, specs, pieces, {"format": "pt"})
