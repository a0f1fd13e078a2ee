"""MiSS, Matrix Shard Sharing, in its standard form (arXiv 2409.15371, Eq. 4 to 7).

A frozen W (out, in) gets one trainable D (r, out), zeros at first. The input's last dimension is cut into blocks
of r that are added up to S, and y = W x + S D. Where r does not divide `in`, the last block is shorter and
meets D's first (in mod r) rows, as if the input were padded with zeros.

A D of fewer columns is repeated along the output (`rwkv_miss.adapters.mini`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rwkv_miss.adapters.factors import exact_multiple
from rwkv_miss.adapters.method import Factors, LinearMethod
from rwkv_miss.config import AdapterConfig
from rwkv_miss.errors import UserError
from rwkv_miss.model.linear import FrozenLinear, Linear
from rwkv_miss.ops.blocks import add_to_blocks, block_sum

# Rows x r, as a multiple of the linear's inputs, from which on dW is added to the weight: measured (docs/log.md).
FOLD_FROM = 128


def delta_weight(D: Tensor, in_features: int) -> Tensor:
    """dW (out, in) with dW[o, c] = D[c mod r, o]: what merging adds to W. Given only some columns of D
    (r, out), it returns the same rows of dW."""
    r = D.shape[0]
    return torch.cat([D.T.contiguous()] * -(-in_features // r), 1)[:, :in_features]


def _ones(r: int, in_features: int) -> Tensor:
    """The matrix (r, in) by which S = A x: A[j, c] is 1 where c mod r = j, 0 elsewhere."""
    return (torch.arange(in_features) % r == torch.arange(r)[:, None]).float()


def folds(linear: FrozenLinear, n_rows: int, r: int) -> bool:
    """Whether n_rows rows of x are multiplied by W + dW. The sum is a pass over the weight, the same for any number of
    rows; it takes the place of two products of 2 r operations for each output of each row (S D, and dy D^T in the
    backward pass) and of a pass over x's gradient. A weight that is stored in another form is never summed."""
    return isinstance(linear, Linear) and n_rows * r >= FOLD_FROM * linear.in_features


def _folded(linear: FrozenLinear, D: Tensor) -> Tensor:
    """W + dW in W's dtype, in memory of its own."""
    W = linear.rows(0, linear.out_features)
    return add_to_blocks(W, D.to(W.dtype).T.contiguous(), out=torch.empty_like(W))


class _MissFunction(torch.autograd.Function):
    """y = x W^T + S D as one autograd node: beside the weights, it saves only S (and the dropout mask) for backward.
    A D (r, m) is repeated out / m times. W + dW, where it is used, is computed a second time in the backward pass."""

    @staticmethod
    def forward(ctx, x: Tensor, linear: FrozenLinear, D: Tensor, keep: Tensor | None, scale: float) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        S = block_sum(rows if keep is None else rows * keep * scale, D.shape[0])
        is_whole = D.shape[1] == linear.out_features
        ctx.folds = keep is None and is_whole and folds(linear, len(rows), D.shape[0])
        if ctx.folds:
            y = torch.mm(rows, _folded(linear, D).T)
        else:
            y = linear.forward(rows)
            if is_whole:
                y.addmm_(S, D.to(y.dtype))
            else:
                y.view(len(y), -1, D.shape[1]).add_(torch.mm(S, D.to(y.dtype)).unsqueeze(1))
        ctx.save_for_backward(S, D, keep)
        ctx.linear, ctx.scale, ctx.x_shape = linear, scale, x.shape
        return y.view(*x.shape[:-1], linear.out_features)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        S, D, keep = ctx.saved_tensors
        dy = dy.reshape(-1, dy.shape[-1])
        dx = dD = None
        if ctx.needs_input_grad[0] and ctx.folds:
            dx = torch.mm(dy, _folded(ctx.linear, D))
        elif ctx.needs_input_grad[0]:
            dx = ctx.linear.input_gradient(dy)
        if D.shape[1] < dy.shape[1]:
            dy = dy.view(len(dy), -1, D.shape[1]).sum(dim=1)
        if dx is not None and not ctx.folds:
            dS = torch.mm(dy, D.to(dy.dtype).T)
            if keep is None:
                add_to_blocks(dx, dS)
            else:
                spread = add_to_blocks(torch.zeros_like(dx), dS)
                dx.addcmul_(spread, keep.to(dx.dtype), value=ctx.scale)
        if ctx.needs_input_grad[2]:
            dD = torch.mm(S.T, dy).to(D.dtype)
        return dx if dx is None else dx.view(ctx.x_shape), None, dD, None, None


class MissLinear(nn.Module):
    """A frozen linear with a MiSS adapter beside it. `miss_block`, as HF PEFT calls it, is zero at first, and fp32
    beside weights of lower precision.

    Args:
        shape: of `miss_block`: (r, out) for D, (r, m) for a D that is repeated.
    """

    def __init__(self, linear: FrozenLinear, shape: tuple[int, ...], dropout: float) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.dropout = dropout
        like = linear.rows(0, 0)
        wide = torch.promote_types(like.dtype, torch.float32)
        self.miss_block = nn.Parameter(torch.zeros(shape, dtype=wide, device=like.device))
        self.base_layer = linear

    def forward(self, x: Tensor) -> Tensor:
        return _MissFunction.apply(x, self.base_layer, self.miss_block, self.kept(x), 1 / (1 - self.dropout))

    def kept(self, x: Tensor) -> Tensor | None:
        """bool (M, in): which elements of x dropout leaves; None where it drops nothing."""
        if not self.training or self.dropout == 0:
            return None
        return torch.rand(x.numel() // x.shape[-1], x.shape[-1], device=x.device) >= self.dropout

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, block={tuple(self.miss_block.shape)}"


class Miss(LinearMethod):
    """The standard form, and what the forms share: one tensor, PEFT's fields."""

    names = ("miss_block",)
    peft_type = "MISS"
    variant: bool | str = True
    """PEFT's init_weights, which says the form."""

    def wrap(self, linear: FrozenLinear, config: AdapterConfig) -> nn.Module:
        shape = self.shapes(linear.in_features, linear.out_features, config)["miss_block"]
        return MissLinear(linear, shape, config.dropout)

    def shapes(self, in_features: int, out_features: int, config: AdapterConfig) -> dict[str, tuple[int, ...]]:
        return {"miss_block": (config.r, out_features)}

    def refuses(self, in_features: int, out_features: int, config: AdapterConfig) -> str | None:
        if config.r <= in_features:
            return None
        return f"r is {config.r} but the linear has only {in_features} inputs; lower adapter.r"

    def delta(self, W: Tensor, start: int, tensors: Mapping[str, Tensor], config: AdapterConfig) -> Tensor:
        D = tensors["miss_block"].float()
        stop = start + len(W)
        if stop <= D.shape[1]:
            columns = D[:, start:stop]  # without a copy: a merge asks for few rows at a time
        else:
            columns = D[:, torch.arange(start, stop, device=D.device) % D.shape[1]]
        return delta_weight(columns, W.shape[1])

    def factors(
        self, tensors: Mapping[str, Tensor], shape: torch.Size, config: AdapterConfig, exact: bool = True
    ) -> Factors | None:
        D = tensors["miss_block"].float()
        return Factors(_ones(len(D), shape[1]), D.repeat(1, shape[0] // D.shape[1]).T.contiguous())

    def from_factors(self, factors: Factors, config: AdapterConfig) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Where A is that of `factors`, or a multiple of it."""
        r, in_features = factors.A.shape
        multiple = factors.A[0, 0]
        if not torch.equal(factors.A, multiple * _ones(r, in_features)):
            return None
        D = exact_multiple(factors.B, multiple.item())
        return None if D is None else ({"miss_block": D.T.contiguous()}, {})

    def reads(self, fields: Mapping[str, Any]) -> bool:
        variant = fields.get("init_weights", True)
        # False is the standard form too: D then started from random values.
        return super().reads(fields) and (variant is False or variant) == self.variant

    def to_peft(self, config: AdapterConfig) -> dict[str, Any]:
        fields = {"r": config.r, "mini_r": 1, "miss_dropout": config.dropout, "bias": "none"}
        return fields | {"init_weights": self.variant}

    def from_peft(self, fields: Mapping[str, Any], file: str) -> dict[str, Any]:
        r, dropout, bias = fields.get("r"), fields.get("miss_dropout", 0.0), fields.get("bias", "none")
        if type(r) is not int or r < 1:
            raise UserError(f"{file}: r is {r!r}; expected a whole number of at least 1")
        if type(dropout) not in (int, float) or not 0 <= dropout < 1:
            raise UserError(f"{file}: miss_dropout is {dropout!r}; expected a number in [0, 1)")
        if bias not in ("none", "all") and not str(bias).endswith("_only"):
            raise UserError(f"{file}: bias is {bias!r}; expected none, all or MiSS_only")
        found: dict[str, Any] = {"r": r, "dropout": float(dropout)}
        if bias == "all":  # The linears have none, so that MiSS_only means none.
            found["modules_to_save"] = [*(fields.get("modules_to_save") or []), "bias"]
        return found


METHOD = Miss()
