"""The log-probabilities that a language model's head gives to the targets, without holding every logit at once."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# Most logits held at a time: 128 MiB in fp32. Fewer make the products too small (docs/log.md).
_MAX_LOGITS = 32 * 2**20


def target_log_probs(
    hidden: Tensor, weight: Tensor, targets: Tensor, reduction: Literal["sum", "none"] = "sum"
) -> Tensor:
    """log softmax(hidden weight^T)[target] of the positions whose target is not negative, in fp32 (float64 in a float64
    model). Differentiable once with respect to hidden and weight.

    The logits of those positions alone are computed, some at a time, and none are kept: their gradient but for the
    factor that comes from above, one minus the probability at the target and minus the probability elsewhere, is
    multiplied with the weight and the hidden state as soon as it is there.

    Args:
        hidden: (B, T, C).
        weight: (V, C).
        targets: int64 (B, T).
        reduction: "sum" gives their sum, (); "none" each position's own, (B, T), 0 where there is no target. With a
            weight that is trained, "none" computes the logits a second time in the backward pass.
    """
    has_target = targets.reshape(-1) >= 0
    rows, wanted = hidden.reshape(-1, hidden.shape[-1])[has_target], targets.reshape(-1)[has_target]
    values = _LogProbs.apply(rows, weight, wanted, reduction == "sum", torch.is_grad_enabled())
    if reduction == "sum":
        return values
    return values.new_zeros(targets.numel()).masked_scatter(has_target, values).view(targets.shape)


class _LogProbs(torch.autograd.Function):
    """log p of each row's target, (M,), or their sum."""

    @staticmethod
    def forward(ctx, rows: Tensor, weight: Tensor, wanted: Tensor, is_sum: bool, grad_enabled: bool) -> Tensor:
        ctx.needs = tuple(needed and grad_enabled for needed in ctx.needs_input_grad[:2])
        # A factor of its own for each row cannot be multiplied into a sum over the rows afterwards.
        ctx.is_late = ctx.needs[1] and not is_sum
        values, d_rows, d_weight = _pieces(rows, weight, wanted, None, *((False, False) if ctx.is_late else ctx.needs))
        ctx.save_for_backward(*((rows, weight, wanted) if ctx.is_late else (d_rows, d_weight)))
        return values.sum() if is_sum else values

    @staticmethod
    @once_differentiable
    def backward(ctx, d_values: Tensor):
        if ctx.is_late:
            _, d_rows, d_weight = _pieces(*ctx.saved_tensors, d_values, *ctx.needs)
        else:
            factor = d_values if d_values.ndim == 0 else d_values.unsqueeze(1)
            d_rows, d_weight = (None if d is None else (d * factor).to(d.dtype) for d in ctx.saved_tensors)
        return d_rows, d_weight, None, None, None


def _pieces(
    rows: Tensor, weight: Tensor, wanted: Tensor, factors: Tensor | None, needs_rows: bool, needs_weight: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """log p of each row's target, and the gradients with respect to rows and weight of their sum, or of their sum with
    `factors` (M,)."""
    values = rows.new_zeros(len(rows), dtype=torch.promote_types(rows.dtype, torch.float32))
    d_rows = torch.empty_like(rows) if needs_rows else None
    d_weight = torch.zeros_like(weight) if needs_weight else None
    size = max(1, _MAX_LOGITS // len(weight))
    for start in range(0, len(rows), size):
        piece = slice(start, start + size)
        log_probs = F.linear(rows[piece], weight).log_softmax(dim=-1, dtype=values.dtype)
        at_target = wanted[piece].unsqueeze(1)
        values[piece] = log_probs.gather(1, at_target).squeeze(1)
        if not needs_rows and not needs_weight:
            continue
        gradient = log_probs.exp_().neg_()
        gradient.scatter_add_(1, at_target, gradient.new_ones(at_target.shape))
        if factors is not None:
            gradient *= factors[piece].unsqueeze(1)
        gradient = gradient.to(rows.dtype)
        if d_rows is not None:
            torch.mm(gradient, weight, out=d_rows[piece])
        if d_weight is not None:
            d_weight.addmm_(gradient.T, rows[piece])
    return values, d_rows, d_weight
