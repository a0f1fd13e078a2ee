"""An export target, added as CONTRIBUTING.md describes: NumPy's .npz, every tensor in fp32."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rwkv_miss.errors import UserError
from rwkv_miss.export.target import Target, Weights


def _write(path: Path, weights: Weights) -> None:
    if not all(spec.dtype == torch.float32 for spec in weights.specs.values()):
        raise UserError(f"{path}: .npz holds fp32 alone; give --dtype fp32")
    with path.open("wb") as file:
        np.savez(file, **{key: weights.compute(key).numpy().copy() for key in weights.specs})


def _read(path: Path) -> dict[str, Tensor]:
    with np.load(path) as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


TARGET = Target(".npz", _write, _read)
