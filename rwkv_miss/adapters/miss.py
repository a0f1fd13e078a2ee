"""MiSS, Matrix Shard Sharing, in its standard form (arXiv 2409.15371, Eq. 4 to 7).

A frozen W (out, in) gets one trainable D (r, out), zeros at first. The input's last dimension is cut into blocks
of r that are added up to S, and y = W x + S D. Where r does not divide `in`, the last block is shorter and
meets D's first (in mod r) rows, as if the input were padded with zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def block_sum(x: Tensor, r: int) -> Tensor:
    """S (M, r) of x (M, in), in x's dtype: the sum of x's blocks of r."""
    M, n = x.shape
    whole = n - n % r
    S = x[:, :whole].view(M, -1, r).sum(dim=1)
    if whole < n:
        S[:, : n - whole] += x[:, whole:]
    return S


def add_to_blocks(x: Tensor, block: Tensor) -> Tensor:
    """Adds block (M, r) to every block of r columns of x (M, in), in place: the transpose of `block_sum`."""
    M, n = x.shape
    r = block.shape[1]
    whole = n - n % r
    x[:, :whole].view(M, -1, r).add_(block.unsqueeze(1))
    if whole < n:
        x[:, whole:].add_(block[:, : n - whole])
    return x


def delta_weight(D: Tensor, in_features: int) -> Tensor:
    """dW (out, in) with dW[o, c] = D[c mod r, o]: what merging adds to W."""
    r = D.shape[0]
    return D.T.repeat(1, -(-in_features // r))[:, :in_features]


class _MissFunction(torch.autograd.Function):
    """y = x W^T + S D in one node of the graph: beside the weights it keeps S alone (and a dropout mask)."""

    @staticmethod
    def forward(ctx, x: Tensor, W: Tensor, D: Tensor, keep: Tensor | None, scale: float) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        S = block_sum(rows if keep is None else rows * keep * scale, D.shape[0])
        y = torch.mm(rows, W.T)
        y.addmm_(S, D.to(y.dtype))
        ctx.save_for_backward(S, W, D, keep)
        ctx.scale, ctx.x_shape = scale, x.shape
        return y.view(*x.shape[:-1], W.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        S, W, D, keep = ctx.saved_tensors
        dy = dy.reshape(-1, dy.shape[-1])
        dx = dD = None
        if ctx.needs_input_grad[0]:
            dx = torch.mm(dy, W)
            dS = torch.mm(dy, D.to(dy.dtype).T)
            if keep is None:
                add_to_blocks(dx, dS)
            else:
                spread = add_to_blocks(torch.zeros_like(dx), dS)
                dx.addcmul_(spread, keep.to(dx.dtype), value=ctx.scale)
            dx = dx.view(ctx.x_shape)
        if ctx.needs_input_grad[2]:
            dD = torch.mm(S.T, dy).to(D.dtype)
        return dx, None, dD, None, None


class MissLinear(nn.Module):
    """A linear without bias, frozen, with a MiSS adapter beside it. Its state dict is the linear's plus
    `miss_block`, HF PEFT's name for D."""

    def __init__(self, linear: nn.Linear, r: int, dropout: float) -> None:
        super().__init__()
        assert linear.bias is None, "RWKV's linears have no bias"
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.r, self.dropout = r, dropout
        self.weight = linear.weight.requires_grad_(False)
        # fp32 whatever the base's dtype: updates of a bf16 parameter would be lost to rounding.
        zeros = torch.zeros(r, linear.out_features, dtype=torch.promote_types(linear.weight.dtype, torch.float32))
        self.miss_block = nn.Parameter(zeros.to(linear.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        keep = None
        if self.training and self.dropout > 0:
            keep = torch.rand(x.numel() // x.shape[-1], x.shape[-1], device=x.device) >= self.dropout
        return _MissFunction.apply(x, self.weight, self.miss_block, keep, 1 / (1 - self.dropout))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, r={self.r}"
