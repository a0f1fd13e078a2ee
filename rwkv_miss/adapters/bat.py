"""MiSS guided by the weight, which HF PEFT calls `bat`. W (out, in) is cut into r x r blocks, and each block becomes
W + W B + B with a trainable B (r, r), zero at first. Which blocks share a B is the layout:

- output: all blocks of the same r rows of W, as HF PEFT has it: B is (out / r, r, r);
- input: all blocks of the same r columns, as RWKV-PEFT's files have it: B is (in / r, r, r).

dW depends on W, so that W is read, in pieces of rows, in every forward and backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rwkv_miss.adapters.method import Factors, option
from rwkv_miss.adapters.miss import Miss, MissLinear
from rwkv_miss.config import AdapterConfig
from rwkv_miss.model.linear import FrozenLinear

LAYOUTS = ("output", "input")
# Elements of the weight that are held beside it at a time, in a few copies.
_PIECE = 2**22


def delta_weight(W: Tensor, start: int, B: Tensor, layout: str) -> Tensor:
    """What is added to rows `start`, `start` + 1, ... of the weight: W (M, in) -> (M, in). B (n, r, r) has W's
    dtype."""
    M, n_in = W.shape
    r = B.shape[-1]
    rows = torch.arange(start, start + M, device=W.device)
    if layout == "input":
        product = torch.bmm(W.view(M, -1, r).transpose(0, 1), B).transpose(0, 1)  # (M, in / r, r)
        return (product + B[:, rows % r].transpose(0, 1)).reshape(M, n_in)
    if start % r or M % r:  # some rows of a group: each row with its own B
        own = B[rows // r]
        product = torch.bmm(W.view(M, -1, r), own)
    else:
        product = torch.bmm(W.view(M // r, -1, r), B[start // r : (start + M) // r]).view(M, -1, r)
    return (product + B[rows // r, rows % r].unsqueeze(1)).view(M, n_in)


class _BatFunction(torch.autograd.Function):
    """y = x W^T + x dW^T as one autograd node, which saves x and computes each piece of dW again in the backward pass.
    The two products are added, not the weights: beside a bf16 W most of dW would be rounded away."""

    @staticmethod
    def forward(ctx, x: Tensor, linear: FrozenLinear, B: Tensor, layout: str, keep: Tensor | None, scale: float):
        rows = x.reshape(-1, x.shape[-1])
        y = linear.forward(rows)
        dropped = rows if keep is None else rows * keep * scale
        narrow = B.to(y.dtype)
        for piece in _pieces(linear, B.shape[-1]):
            dW = delta_weight(linear.rows(piece.start, piece.stop), piece.start, narrow, layout)
            y[:, piece].addmm_(dropped, dW.T)
        ctx.save_for_backward(rows, B, keep)
        ctx.linear, ctx.layout, ctx.scale, ctx.x_shape = linear, layout, scale, x.shape
        return y.view(*x.shape[:-1], linear.out_features)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        rows, B, keep = ctx.saved_tensors
        linear = ctx.linear
        dy = dy.reshape(-1, dy.shape[-1])
        dropped = rows if keep is None else rows * keep * ctx.scale
        narrow = B.detach().to(dy.dtype).requires_grad_()
        dB, d_dropped = torch.zeros_like(B), torch.zeros_like(rows)
        for piece in _pieces(linear, B.shape[-1]):
            with torch.enable_grad():
                dW = delta_weight(linear.rows(piece.start, piece.stop), piece.start, narrow, ctx.layout)
            d_dropped.addmm_(dy[:, piece], dW.detach())
            dB += torch.autograd.grad(dW, narrow, torch.mm(dy[:, piece].T, dropped))[0]
        dx = linear.input_gradient(dy).add_(d_dropped if keep is None else d_dropped * keep * ctx.scale)
        return dx.view(ctx.x_shape), None, dB, None, None, None


def _pieces(linear: FrozenLinear, r: int) -> Iterator[slice]:
    """The weight's rows, in whole groups of r."""
    step = max(1, _PIECE // (linear.in_features * r)) * r
    for start in range(0, linear.out_features, step):
        yield slice(start, min(start + step, linear.out_features))


class BatLinear(MissLinear):
    """A frozen linear with the adapter beside it; `miss_block` is B."""

    def __init__(self, linear: FrozenLinear, shape: tuple[int, ...], dropout: float, layout: str) -> None:
        super().__init__(linear, shape, dropout)
        self.layout = layout

    def forward(self, x: Tensor) -> Tensor:
        scale = 1 / (1 - self.dropout)
        return _BatFunction.apply(x, self.base_layer, self.miss_block, self.layout, self.kept(x), scale)


class Bat(Miss):
    variant = "bat"

    def wrap(self, linear: FrozenLinear, config: AdapterConfig) -> nn.Module:
        shape = self.shapes(linear.in_features, linear.out_features, config)["miss_block"]
        return BatLinear(linear, shape, config.dropout, option(config, "layout"))

    def shapes(self, in_features: int, out_features: int, config: AdapterConfig) -> dict[str, tuple[int, ...]]:
        cut = in_features if option(config, "layout") == "input" else out_features
        return {"miss_block": (cut // config.r, config.r, config.r)}

    def refuses(self, in_features: int, out_features: int, config: AdapterConfig) -> str | None:
        if option(config, "layout") not in LAYOUTS:
            return f"layout is {option(config, 'layout')!r}; it must be {' or '.join(LAYOUTS)}"
        if in_features % config.r or out_features % config.r:
            return f"r is {config.r}, which does not divide both sizes of the linear, {in_features} -> {out_features}"
        return None

    def delta(self, W: Tensor, start: int, tensors: Mapping[str, Tensor], config: AdapterConfig) -> Tensor:
        return delta_weight(W, start, tensors["miss_block"].float(), option(config, "layout"))

    def factors(
        self, tensors: Mapping[str, Tensor], shape: torch.Size, config: AdapterConfig, exact: bool = True
    ) -> Factors | None:
        return None

    def from_factors(self, factors: Factors, config: AdapterConfig) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        return None

    def fits_peft(self, config: AdapterConfig) -> bool:
        return super().fits_peft(config) and option(config, "layout") == "output"


METHOD = Bat()
