"""What the adapter formats in safetensors files share: the product beside each linear, one linear after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from rwkv_miss.checkpoint import TensorSpec, write_safetensors_in_pieces
from rwkv_miss.errors import UserError
from rwkv_miss.export.target import Adapter


def write_lora(
    path: Path, adapter: Adapter, dtype: torch.dtype, tensors: Callable[[str, tuple[Tensor, ...]], Mapping[str, Tensor]]
) -> None:
    """Writes an adapter, one linear at a time, and then what was trained directly.

    Args:
        tensors: (a linear's path and its product, or a key and its tensor) -> what the file holds of it, by name.

    Raises:
        UserError: the adapter has no such products, or the dtype cannot hold their numbers.
    """

    def every() -> Iterator[tuple[str, Tensor]]:
        for path, trained in chain(adapter.factors(), adapter.whole()):
            yield from tensors(path, trained).items()

    def pieces(name: str) -> list[Tensor]:
        found, tensor = next(again)
        assert found == name, (found, name)
        stored = tensor.to(dtype)
        if not torch.isfinite(stored).all():
            largest = f"{torch.finfo(dtype).max:,g}"
            raise UserError(f"{adapter.folder}: {name} has numbers beyond {largest}, the largest of {dtype}")
        return [stored]

    specs, again = {name: TensorSpec(tensor.shape, dtype) for name, tensor in every()}, every()
    write_safetensors_in_pieces(path, specs, pieces, {"format": "pt"})
