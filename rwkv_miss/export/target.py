"""What is exported (`Weights`), and the file formats that it can be written to (`Target`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rwkv_miss.checkpoint import TensorSpec
from rwkv_miss.config import ModelConfig


@dataclass(frozen=True)
class Weights:
    """A model's tensors, each made when it is asked for, so that they are never all in memory.

    sizes: the model's sizes.
    specs: every tensor's shape and dtype by its key in BlinkDL's layout, in the order of the file to write.
    pieces: key -> some rows after the other of the tensor that its spec describes, contiguous. It is called once for
        each key, in that order, and what it gave before may be overwritten when the next is asked for.
    """

    sizes: ModelConfig
    specs: Mapping[str, TensorSpec]
    pieces: Callable[[str], Iterable[Tensor]]

    def compute(self, key: str) -> Tensor:
        """The whole tensor, for formats that are written so; called in place of `pieces`."""
        spec = self.specs[key]
        out, at = torch.empty(spec.shape.numel(), dtype=spec.dtype), 0
        for piece in self.pieces(key):
            out[at : at + piece.numel()] = piece.flatten()
            at += piece.numel()
        return out.view(spec.shape)


@dataclass(frozen=True)
class Target:
    """A file format that a model can be written to.

    suffix: what the names of such files end in.
    write: (path, weights): writes the file, one tensor at a time. Raises OSError if it cannot be written, UserError if
        the format cannot hold the model.
    read: path -> the tensors of such a file by their keys in BlinkDL's layout, equal to those of `Weights`: a file is
        verified by reading it back.
    """

    suffix: str
    write: Callable[[Path, Weights], None]
    read: Callable[[Path], Mapping[str, Tensor]]
