"""A forward pass that holds a part of a mapped model at a time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rwkv_miss.model.base import RWKV
from rwkv_miss.plain_reads import Reader

# Rows of the head that are read at a time.
_ROWS = 4096


@torch.no_grad()
def logits_block_by_block(model: RWKV, tokens: Tensor, reader: Reader, dtype: torch.dtype | None = None) -> Tensor:
    """The logits (B, T, V) of tokens (B, T), in the model's dtype. The frozen weights of each block are read from their
    file before it runs, and given up after it; of the embedding the rows of these tokens are read, and the head in
    pieces. Trained weights have other values than the file, and stay as they are.
    Args:
        reader: of the model's tensors.
        dtype: which the weights have while they are used; None: their own.
    """

    def is_read(p: Tensor) -> bool:
        return not p.requires_grad and (reader.is_mapped(p) or dtype not in (None, p.dtype))

    parts = [*model.blocks, model.ln_out]
    # One buffer for all parts: blocks of memory that come and go cost a page fault for each page, each time.
    buffer = torch.empty(max(sum(map(_size, part.parameters())) for part in parts), dtype=torch.uint8)
    mapped: list[tuple[Tensor, Tensor]] = []

    def read(part: nn.Module, inputs: object) -> None:
        at = 0
        for p in part.parameters():
            if is_read(p):
                mapped.append((p, p.data))
                size = _size(p)
                p.data = reader.read(p.data, buffer[at : at + p.nbytes].view(p.dtype).view(p.shape)).to(dtype)
                at += size

    def read_rows(emb: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor] | None:
        p = model.emb.weight
        if not is_read(p):
            return None
        rows, row_of_token = inputs[0].unique(return_inverse=True)
        mapped.append((p, p.data))
        p.data = torch.stack([reader.read(p.data[row]) for row in rows]).to(dtype)
        return (row_of_token,)

    def give_up(part: nn.Module, inputs: object, outputs: object) -> None:
        for p, data in mapped:
            p.data = data
        mapped.clear()

    hooks = [part.register_forward_pre_hook(read) for part in parts]
    hooks += [model.emb.register_forward_pre_hook(read_rows)]
    hooks += [part.register_forward_hook(give_up) for part in (model.emb, *parts)]
    try:
        hidden, _ = model.hidden(tokens)
    finally:
        for hook in hooks:
            hook.remove()
    head = model.head.weight
    if head.requires_grad:
        return F.linear(hidden, head)
    part = torch.empty_like(head[:_ROWS])
    pieces = (reader.read(rows, part[: len(rows)]).to(dtype) for rows in head.split(_ROWS))
    return torch.cat([F.linear(hidden, piece) for piece in pieces], -1)


def _size(p: Tensor) -> int:
    """The bytes that a parameter takes in the buffer, in which each begins at a multiple of 64."""
    return -(-p.nbytes // 64) * 64
