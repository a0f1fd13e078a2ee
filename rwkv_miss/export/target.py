"""What is exported, and what a target of an export is."""

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

    sizes: of the model.
    specs: every tensor's shape and dtype by its key in BlinkDL's layout, in the order of the file to write.
    compute: key -> the tensor that its spec describes. What it returned before may be overwritten by the next call.
    """

    sizes: ModelConfig
    specs: Mapping[str, TensorSpec]
    compute: Callable[[str], Tensor]


@dataclass(frozen=True)
class Target:
    """A file format that a model can be written to.

    suffix: what the names of such files end in.
    write: (path, weights): writes the file, one tensor at a time. OSError: the disk refused. UserError: the format
        cannot hold the model.
    read: path -> the tensors of such a file by their keys in BlinkDL's layout, as `Weights.compute` made them: what was
        written is verified by reading it back.
    """

    suffix: str
    write: Callable[[Path, Weights], None]
    read: Callable[[Path], Mapping[str, Tensor]]
