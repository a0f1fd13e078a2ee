"""Export targets, added as CONTRIBUTING.md describes: NumPy's .npz, of a model and of an adapter alone, all in fp32."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rwkv_miss.adapters.method import Factors
from rwkv_miss.errors import UserError
from rwkv_miss.export.target import Adapter, AdapterTarget, Target, Weights


def _write(path: Path, weights: Weights) -> None:
    if not all(spec.dtype == torch.float32 for spec in weights.specs.values()):
        raise UserError(f"{path}: .npz holds fp32 alone; give --dtype fp32")
    with path.open("wb") as file:
        np.savez(file, **{key: weights.compute(key).numpy().copy() for key in weights.specs})


def _read(path: Path) -> dict[str, Tensor]:
    with np.load(path) as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


def _write_adapter(path: Path, adapter: Adapter) -> None:
    with path.open("wb") as file:
        np.savez(file, **{f"{key} {x}": t.numpy() for key, f in adapter.factors() for x, t in f._asdict().items()})


def _read_adapter(path: Path) -> dict[str, Factors]:
    tensors = _read(path)
    paths = dict.fromkeys(key.split(" ")[0] for key in tensors)
    return {path: Factors(tensors[f"{path} A"], tensors[f"{path} B"]) for path in paths}


TARGET = Target(".npz", _write, _read)
ADAPTER = AdapterTarget(".npz", _write_adapter, _read_adapter, dtypes=("f32",))
