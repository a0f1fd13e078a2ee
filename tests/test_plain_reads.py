"""Mapped tensors read from their files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from rwkv_miss.checkpoint import read_checkpoint
from rwkv_miss.errors import UserError
from rwkv_miss.plain_reads import plain_reads

pytestmark = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux alone says what is mapped")


@pytest.mark.parametrize("name", ["base.pth", "base.st"])
def test_every_tensor_and_parts_of_it(make_base, random_weights, name):
    path = make_base(name, dtype=torch.bfloat16)
    tensors = read_checkpoint(path)
    with plain_reads(tensors.values()) as reader:
        for key, expected in random_weights(dtype=torch.bfloat16).items():
            assert reader.is_mapped(tensors[key])
            found = reader.read(tensors[key])
            assert torch.equal(found, expected) and found.dtype == expected.dtype and not reader.is_mapped(found)
        out = torch.empty(7, 32, dtype=torch.bfloat16)
        assert reader.read(tensors["emb.weight"][50:57], out) is out
        assert torch.equal(out, random_weights(dtype=torch.bfloat16)["emb.weight"][50:57])


def test_it_is_the_file_that_is_read_not_the_map(make_base):
    path = make_base()
    tensors = read_checkpoint(path)
    with plain_reads(tensors.values()) as reader:
        tensors["emb.weight"][:] = 0  # in this process alone
        assert reader.read(tensors["emb.weight"]).any()


def test_tensors_in_memory(make_base):
    tensors = read_checkpoint(make_base())
    with plain_reads([*tensors.values(), other := torch.ones(3)]) as reader:
        assert reader.read(other) is other
        assert torch.equal(reader.read(other, torch.zeros(3)), other)
        columns = tensors["emb.weight"].T
        assert reader.read(columns) is columns
        assert torch.equal(reader.read(columns, torch.empty(columns.shape)), columns)


def test_a_file_that_is_cut(make_base):
    path = make_base()
    tensors = read_checkpoint(path)
    with plain_reads(tensors.values()) as reader:
        os.truncate(path, 5000)
        with pytest.raises(UserError, match=rf"{path}: has become shorter while it was read"):
            reader.read(tensors["head.weight"])


def test_a_file_that_another_has_replaced(make_base, tmp_path):
    """What was mapped is still there; another file has the name."""
    path = make_base()
    tensors = read_checkpoint(path)
    expected = tensors["emb.weight"].clone()
    os.replace(make_base("other.pth", seed=1), path)
    with plain_reads(tensors.values()) as reader:
        assert torch.equal(reader.read(tensors["emb.weight"]), expected)


def test_a_file_that_was_removed(make_base):
    path = make_base()
    tensors = read_checkpoint(path)
    expected = tensors["emb.weight"].clone()
    path.unlink()
    with plain_reads(tensors.values()) as reader:
        assert torch.equal(reader.read(tensors["emb.weight"]), expected)
