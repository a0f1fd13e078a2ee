"""rwkv.cpp's own format, as its docs/FILE_FORMAT.md describes it and python/convert_pytorch_to_ggml.py writes it: six
numbers, then each tensor behind its sizes and its key. RWKV-7's six token shifts are one tensor, the matrices of low
rank are transposed, and in an fp16 file small tensors stay fp32."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rwkv_miss.checkpoint import TensorSpec, content_of, write_plain
from rwkv_miss.export.target import Target, Weights

_MAGIC, _VERSION = 0x67676D66, 101
_CODES = {torch.float32: 0, torch.float16: 1}
_SHIFTS = "rwkvag"
_SHIFT = re.compile(rf"(.*\.att\.x_)([{_SHIFTS}])")
_LOW_RANK = re.compile(r"\.([wagv]|time_maa_w|time_decay_w)[12]$")
_WIDE = re.compile(r"\.(time_.*|k_k|k_a|r_k|x_.|[wav]0)$")


def _stored(key: str, shape: torch.Size, dtype: str) -> torch.dtype:
    return torch.float16 if dtype == "f16" and len(shape) > 1 and not _WIDE.search(key) else torch.float32


def _write(path: Path, weights: Weights) -> None:
    sizes, dtype = weights.sizes, weights.specs["emb.weight"].dtype
    by_head = torch.Size((sizes.n_head, sizes.head_size, 1))
    shifts: dict[str, dict[str, Tensor]] = {}
    with path.open("wb") as file:
        file.write(struct.pack("<6i", _MAGIC, _VERSION, sizes.vocab_size, sizes.n_embd, sizes.n_layer, _CODES[dtype]))
        for key in weights.specs:
            tensor = weights.compute(key)
            if shift := _SHIFT.fullmatch(key):
                layer = shifts.setdefault(shift[1], {})
                layer[shift[2]] = tensor
                if len(layer) < len(_SHIFTS):
                    continue
                key, tensor = shift[1] + _SHIFTS, torch.cat([layer[name] for name in _SHIFTS])
            elif _LOW_RANK.search(key):
                tensor = tensor.mT
            elif key.endswith((".time_faaaa", ".time_decay")):
                tensor = tensor.view(by_head)
            elif ".time_" in key:
                tensor = tensor.flatten()
            name = key.encode()
            file.write(struct.pack("<3i", tensor.ndim, len(name), _CODES[tensor.dtype]))
            file.write(struct.pack(f"<{tensor.ndim}i", *reversed(tensor.shape)) + name)
            write_plain(file, content_of(tensor))


def _read(path: Path) -> dict[str, Tensor]:
    content, at = np.memmap(path, np.uint8, mode="c"), 6 * 4
    dtypes = {code: dtype for dtype, code in _CODES.items()}
    found: dict[str, Tensor] = {}
    while at < len(content):
        n_dims, n_name, code = struct.unpack_from("<3i", content.data, at)
        at += 3 * 4
        *shape, name = struct.unpack_from(f"<{n_dims}i{n_name}s", content.data, at)
        at += 4 * n_dims + n_name
        key, spec = name.decode(), TensorSpec(torch.Size(reversed(shape)), dtypes[code])
        tensor = torch.from_numpy(content[at : at + spec.nbytes]).view(spec.dtype).view(spec.shape)
        at += spec.nbytes
        if key.endswith(f".x_{_SHIFTS}"):
            found |= {key.removesuffix(_SHIFTS) + name: tensor[i : i + 1] for i, name in enumerate(_SHIFTS)}
        elif _LOW_RANK.search(key):
            found[key] = tensor.mT
        elif key.endswith(".time_faaaa"):
            found[key] = tensor.squeeze(-1)
        else:
            found[key] = tensor.view(1, 1, -1) if ".time_" in key else tensor
    return found


TARGET = Target(
    ".bin",
    _write,
    _read,
    dtypes=("f16", "f32"),
    stored=_stored,
    uses={"rwkv.cpp": ("sh", "python python/generate_completions.py {out}")},
)
