"""An adapter as a GGUF file that llama.cpp loads beside a model's (src/llama-adapter.cpp): LoRA's A and B, whatever the
model's own numbers are stored in."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from rwkv_miss.adapters.method import Factors
from rwkv_miss.errors import UserError
from rwkv_miss.export.gguf_layout import check_sizes, linear_of, name_of
from rwkv_miss.export.llama_cpp import RUNTIME
from rwkv_miss.export.target import Adapter, AdapterTarget

_log = logging.getLogger("rwkv_miss")
_DTYPES = {"f32": torch.float32, "f16": torch.float16}


def _write(path: Path, adapter: Adapter) -> None:
    import gguf

    if adapter.sizes.version == 6:
        _log.warning(
            "llama.cpp's own converter rescales RWKV-6 (rwkv6.rescale_every_n_layers), and this file would be wrong "
            "beside such a base: use it on one that rwkv-miss export has written"
        )
    writer = gguf.GGUFWriter(None, f"rwkv{adapter.sizes.version}")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    ranks = set()
    for name, tensor in _tensors(adapter):
        writer.add_tensor_info(name, tensor.shape, tensor.dtype, tensor.nbytes)
        ranks.add(tensor.shape[0 if name.endswith("a") else 1])
    # The scale is alpha / rank, which is to be 1; without alpha it is 1 for any rank.
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(ranks.pop()) if len(ranks) == 1 else 0.0)
    try:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for _, tensor in _tensors(adapter):
            writer.write_tensor_data(tensor)
    finally:
        writer.close()


def _tensors(adapter: Adapter) -> Iterator[tuple[str, np.ndarray]]:
    for path, product in adapter.factors():
        for factor, end in zip(product, (".lora_a", ".lora_b"), strict=True):
            stored = factor.to(_DTYPES[adapter.dtype])
            if not torch.isfinite(stored).all():
                raise UserError(f"{path}: not finite in {adapter.dtype}; give --dtype f32")
            yield name_of(f"{path}.weight", adapter.sizes.version) + end, stored.contiguous().numpy()


def _read(path: Path) -> dict[str, Factors]:
    import gguf

    reader = gguf.GGUFReader(path, "c")
    found = {tensor.name: torch.from_numpy(tensor.data).float() for tensor in reader.tensors}
    names = [name.removesuffix(".lora_a") for name in found if name.endswith(".lora_a")]
    return {linear_of(name): Factors(found[f"{name}.lora_a"], found[f"{name}.lora_b"]) for name in names}


TARGET = AdapterTarget(
    ".gguf",
    _write,
    _read,
    dtypes=("f32", "f16"),
    needs=("gguf", "gguf"),
    runtime=RUNTIME,
    base="gguf",
    check_sizes=check_sizes,
    uses={"llama.cpp, on the base as GGUF": ("sh", "llama-cli -m base.gguf --lora {out}")},
)
