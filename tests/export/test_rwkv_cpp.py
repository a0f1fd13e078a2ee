"""rwkv.cpp's files, read by a few lines after its docs/FILE_FORMAT.md, and compared with what its converter writes."""

from __future__ import annotations

import struct

import pytest
import torch

from rwkv_miss import AdapterConfig, inject, load_model, merge, save_adapter
from rwkv_miss.checkpoint import read_checkpoint
from rwkv_miss.errors import UserError
from rwkv_miss.export.table import TARGETS


def parse(path):
    """(the six numbers, the tensors with PyTorch's order of dimensions)."""
    content = path.read_bytes()
    header, at, found = struct.unpack_from("<6i", content), 24, {}
    while at < len(content):
        n, length, code = struct.unpack_from("<3i", content, at)
        shape = struct.unpack_from(f"<{n}i", content, at + 12)[::-1]
        start = at + 12 + 4 * n + length
        key, dtype = content[start - length : start].decode(), (torch.float32, torch.float16)[code]
        at = start + torch.Size(shape).numel() * dtype.itemsize
        found[key] = torch.frombuffer(bytearray(content[start:at]), dtype=dtype).view(shape)
    return header, found


def converted(weights, is_half):
    """What the converter makes of a model whose heads and head size are 2 and 16."""
    found = {}
    for key, tensor in weights.items():
        name = key.rpartition(".")[2]
        if ".att.x_" in key:
            if not key.endswith("x_r"):
                continue
            key = key.replace("x_r", "x_rwkvag")
            tensor = torch.cat([weights[key.replace("x_rwkvag", f"x_{x}")] for x in "rwkvag"])
        elif name in ("w1", "w2", "a1", "a2", "v1", "v2", "g1", "g2", "time_maa_w1", "time_decay_w1", "time_decay_w2"):
            tensor = tensor.T
        elif name == "time_maa_w2":
            tensor = tensor.permute(0, 2, 1)
        elif name in ("time_decay", "time_faaaa"):
            tensor = tensor.reshape(2, 16, 1)
        elif name.startswith("time_"):
            tensor = tensor.squeeze()
        small = (".time_", ".k_k", ".k_a", ".r_k", ".x_rwkvag", ".x_k", ".w0", ".a0", ".v0")
        narrow = is_half and tensor.ndim > 1 and not any(part in key for part in small)
        found[key] = tensor.half() if narrow else tensor
    return found


@pytest.mark.parametrize("dtype", ["f32", "f16"])
def test_what_its_converter_would_write(either_base, tmp_path, dtype):
    report = merge(either_base, [], tmp_path / "out.bin", dtype, target=TARGETS["rwkv.cpp"])
    header, found = parse(tmp_path / "out.bin")
    weights = read_checkpoint(either_base)
    expected = converted(weights, dtype == "f16")
    assert header == (0x67676D66, 101, 64, 32, 3, 0 if dtype == "f32" else 1)
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert (found[key].shape, found[key].dtype) == (tensor.shape, tensor.dtype), key
        assert torch.equal(found[key], tensor), key
    assert report.logits_error < (1e-6 if dtype == "f32" else 2e-3)


def test_what_cannot_be_held(either_base, tmp_path):
    save_adapter(inject(load_model(either_base), AdapterConfig("state")), tmp_path / "state")
    for message, adapters, dtype in (
        ("no place for a learned state", [tmp_path / "state"], "f32"),
        ("bf16", [], "bf16"),
    ):
        with pytest.raises(UserError, match=message):
            merge(either_base, adapters, tmp_path / "out.bin", dtype, target=TARGETS["rwkv.cpp"])
    assert not list(tmp_path.glob("*out.bin*"))
