"""LoRA files of web-rwkv and Ai00, which add alpha / r x B A to a weight as they load the model (web-rwkv,
src/runtime/loader.rs). alpha is what the user gives for the whole file and r what each pair of matrices has. B is written
r times as large, so that alpha 1 is all of the adapter whatever its ranks; in fp16 its small numbers keep more digits so.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from rwkv_miss.adapters.method import Factors
from rwkv_miss.checkpoint import read_safetensors
from rwkv_miss.export.lora import write_lora
from rwkv_miss.export.target import Adapter, AdapterTarget

_A, _B = ".lora.0", ".lora.1"


def _tensors(linear: str, product: Factors) -> dict[str, Tensor]:
    return {f"{linear}{_A}": product.A.mT, f"{linear}{_B}": len(product.A) * product.B}


def _write(path: Path, adapter: Adapter) -> None:
    write_lora(path, adapter, torch.float16, _tensors)


def _read(path: Path) -> dict[str, Factors]:
    found = {name: tensor.float() for name, tensor in read_safetensors(path).items()}
    linears = [name.removesuffix(_A) for name in found if name.endswith(_A)]
    return {path: Factors(found[path + _A].mT, found[path + _B] / found[path + _A].shape[1]) for path in linears}


TARGET = AdapterTarget(".st", _write, _read, dtypes=("f16",))
