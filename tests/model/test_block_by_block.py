"""A forward pass that holds a part of the model at a time computes what the model computes."""

from __future__ import annotations

import pytest
import torch

from rwkv_miss import AdapterConfig, inject
from rwkv_miss.adapters.inject import trained_parameters
from rwkv_miss.checkpoint import read_checkpoint
from rwkv_miss.model.block_by_block import logits_block_by_block
from rwkv_miss.model.load import build_model
from rwkv_miss.plain_reads import plain_reads


@torch.no_grad()
@pytest.mark.parametrize(
    "trained", [AdapterConfig(r=4), AdapterConfig("state"), AdapterConfig(r=4, modules_to_save=["time"])]
)
def test_the_logits_are_the_models(either_base, trained):
    tensors = read_checkpoint(either_base)
    model = inject(build_model(tensors, either_base), trained)
    for p in trained_parameters(model).values():
        p += 0.01
    tokens = torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(0))
    expected = model(tokens)[0]
    before = [p.data_ptr() for p in model.parameters()]
    frozen = [p for p in model.parameters() if not p.requires_grad]
    with plain_reads(tensors.values()) as reader:
        for p in frozen:
            p.zero_()  # in the map alone: the file is what is read
        for _ in range(2):
            assert torch.equal(logits_block_by_block(model, tokens, reader), expected)
            assert [p.data_ptr() for p in model.parameters()] == before


def test_weights_that_keep_their_dtype_are_converted_as_they_are_read(either_base, tmp_path):
    """As in a file of fp16 matrices and fp32 vectors; one tensor is in memory, not mapped from the file."""
    tensors = {key: t.half() if t.ndim == 2 else t for key, t in torch.load(either_base).items()}
    torch.save(tensors, tmp_path / "mixed.pth")
    tensors = read_checkpoint(tmp_path / "mixed.pth")
    tensors["blocks.1.att.key.weight"] = tensors["blocks.1.att.key.weight"].clone()
    tokens = torch.tensor([[1, 5, 1, 9]])
    expected, _ = build_model(tensors, either_base)(tokens)
    model = build_model(tensors, either_base, as_stored=True).requires_grad_(False)
    with plain_reads(tensors.values()) as reader:
        assert torch.equal(logits_block_by_block(model, tokens, reader, torch.float32), expected)
    assert model.head.weight.dtype == torch.float16
