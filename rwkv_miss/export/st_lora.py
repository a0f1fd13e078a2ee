"""LoRA files of web-rwkv and Ai00, which add alpha / r x B A to a weight as they load the model (web-rwkv,
src/runtime/loader.rs). alpha is what the user gives for the whole file, and r what each pair of matrices has. B is
written r times as large: alpha 1 is then all of the adapter, whatever its ranks, and small numbers keep more digits.
A vector in the file takes the place of the model's; other tensors would be added to it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from rwkv_miss.adapters.method import Factors
from rwkv_miss.checkpoint import read_safetensors
from rwkv_miss.export.lora import write_lora
from rwkv_miss.export.st import key_of, name_of
from rwkv_miss.export.target import Adapter, AdapterTarget

_A, _B = ".lora.0", ".lora.1"


def _is_vector(key: str, shape: torch.Size) -> bool:
    """Whether web-rwkv reads it as a vector, which it does not do for RWKV-7's r_k, whatever its shape."""
    return len(shape) != 2 and shape[:-1].numel() == 1


def _tensors(path: str, trained: tuple[Tensor, ...]) -> dict[str, Tensor]:
    if len(trained) == 1:
        return {name_of(path): trained[0]}
    A, B = trained
    return {f"{path}{_A}": A.mT, f"{path}{_B}": len(A) * B}


def _write(path: Path, adapter: Adapter) -> None:
    write_lora(path, adapter, torch.float16, _tensors)


def _read(path: Path) -> dict[str, tuple[Tensor, ...]]:
    found = {name: tensor.float() for name, tensor in read_safetensors(path).items()}
    products: dict[str, tuple[Tensor, ...]] = {}
    for name, tensor in found.items():
        if name.endswith(_A):
            linear = name.removesuffix(_A)
            products[linear] = Factors(tensor.mT, found[linear + _B] / tensor.shape[1])
        elif not name.endswith(_B):
            products[key_of(name)] = (tensor,)
    return products


TARGET = AdapterTarget(
    ".st",
    _write,
    _read,
    dtypes=("f16",),
    holds=_is_vector,
    uses={"Ai00, in assets/configs/Config.toml": ("toml", "[[lora]]\nalpha = 1.0\npath = {out}")},
)
