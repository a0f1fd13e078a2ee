"""A forward pass that holds a part of a mapped model at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from rwkv_miss.model.base import RWKV
from rwkv_miss.plain_reads import Reader


@contextmanager
def block_by_block(model: RWKV, reader: Reader) -> Iterator[None]:
    """In the context, the frozen weights of each block, of the embedding and of the head are read from their file
    before it runs, and given up after it. Trained ones have other values than the file, and stay as they are.

    Args:
        reader: of the model's tensors.
    """
    parts = [model.emb, *model.blocks, model.ln_out, model.head]
    # One buffer for all parts: blocks of memory that come and go cost a page fault for each page, each time.
    buffer = torch.empty(max(sum(map(_size, part.parameters())) for part in parts), dtype=torch.uint8)
    mapped: list[tuple[nn.Parameter, Tensor]] = []

    def read(part: nn.Module, inputs: object) -> None:
        at = 0
        for p in part.parameters():
            if not p.requires_grad and reader.is_mapped(p):
                mapped.append((p, p.data))
                p.data = reader.read(p.data, buffer[at : at + p.nbytes].view(p.dtype).view(p.shape))
                at += _size(p)

    def give_up(part: nn.Module, inputs: object, outputs: object) -> None:
        for p, data in mapped:
            p.data = data
        mapped.clear()

    hooks = [part.register_forward_pre_hook(read) for part in parts]
    hooks += [part.register_forward_hook(give_up) for part in parts]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _size(p: Tensor) -> int:
    """The bytes that a parameter takes in the buffer, in which each begins at a multiple of 64."""
    return -(-p.nbytes // 64) * 64
