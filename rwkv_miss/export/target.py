"""What is exported (`Weights`), and the file formats that it can be written to (`Target`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from rwkv_miss.checkpoint import TensorSpec
from rwkv_miss.config import ModelConfig


@dataclass(frozen=True)
class Weights:
    """A model's tensors, each made when it is asked for, so that they are never all in memory.

    sizes: the model's sizes.
    specs: every tensor's shape and dtype by its key in BlinkDL's layout, in the order of the file to write.
    compute: key -> the tensor that its spec describes. It is called once for each key, in that order, and what it
        returned before may be overwritten by the next call.
    """

    sizes: ModelConfig
    specs: Mapping[str, TensorSpec]
    compute: Callable[[str], Tensor]


@dataclass(frozen=True)
class Target:
    """A file format that a model can be written to.

    suffix: what the names of such files end in.
    write: (path, weights): writes the file, one tensor at a time. Raises OSError if it cannot be written, UserError if
        the format cannot hold the model.
    read: path -> the tensors of such a file by their keys in BlinkDL's layout, equal to those that `Weights.compute`
        made: a file is verified by reading it back.
    """

    suffix: str
    write: Callable[[Path, Weights], None]
    read: Callable[[Path], Mapping[str, Tensor]]
