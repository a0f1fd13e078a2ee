"""Sums over the blocks of r columns of a matrix, the last of which may be shorter: in PyTorch operations, or for bf16
on a CPU in C++, where a compiler is found. (fp32 in C++ is only as fast as PyTorch.)"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from rwkv_miss.ops.cpu import kernel

_SOURCE = Path(kernel.__file__).with_name("blocks.cpp")


def block_sum(x: Tensor, r: int) -> Tensor:
    """S (M, r) of x (M, in), in x's dtype: the sum of x's blocks of r columns."""
    M, n = x.shape
    if _in_cpp(x):
        S = x.new_empty(M, r)
        kernel.call(_SOURCE, "block_sum", [x.contiguous(), S, M, n, r, torch.get_num_threads()])
        return S
    whole = n - n % r
    S = x[:, :whole].view(M, n // r, r).sum(dim=1)
    if whole < n:
        S[:, : n - whole] += x[:, whole:]
    return S


def add_to_blocks(x: Tensor, block: Tensor, out: Tensor | None = None) -> Tensor:
    """Adds block (M, r) to every block of r columns of x (M, in), the transpose of `block_sum`: in place, or into
    `out`, which is like x. All are contiguous and of one dtype."""
    M, n = x.shape
    r = block.shape[1]
    out = x if out is None else out
    if _in_cpp(x):
        kernel.call(_SOURCE, "add_to_blocks", [x, block, out, M, n, r, torch.get_num_threads()])
        return out
    whole = n - n % r
    torch.add(x[:, :whole].view(M, n // r, r), block.unsqueeze(1), out=out[:, :whole].view(M, n // r, r))
    if whole < n:
        torch.add(x[:, whole:], block[:, : n - whole], out=out[:, whole:])
    return out


def _in_cpp(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == torch.bfloat16 and kernel.library_or_reason(_SOURCE)[0] is not None
