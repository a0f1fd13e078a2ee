"""The log-probabilities that a language model's head gives to the targets, without holding every logit at once."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rwkv_miss.ops.cpu import kernel

_SOURCE = Path(kernel.__file__).with_name("log_probs.cpp")
_FUNCTIONS = {torch.float32: "log_probs_f32", torch.bfloat16: "log_probs_bf16"}
# Most logits held at a time: 128 MiB in fp32. Fewer make the products too small (docs/log.md).
_MAX_LOGITS = 32 * 2**20


def target_log_probs(
    hidden: Tensor, weight: Tensor, targets: Tensor, reduction: Literal["sum", "none"] = "sum"
) -> Tensor:
    """log softmax(hidden weight^T)[target] of the positions whose target is not negative, in fp32 (float64 in a float64
    model). Differentiable once with respect to hidden and weight, in one backward pass.

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
        needs_rows, needs_weight = (needed and grad_enabled for needed in ctx.needs_input_grad[:2])
        # A factor of its own for each row cannot be multiplied into a sum over the rows afterwards.
        ctx.is_late = needs_weight and not is_sum
        now = not ctx.is_late
        values, d_rows, d_weight = _pieces(rows, weight, wanted, None, needs_rows and now, needs_weight and now)
        ctx.save_for_backward(*((rows, weight, wanted) if ctx.is_late else (d_rows, d_weight)))
        return values.sum() if is_sum else values

    @staticmethod
    @once_differentiable
    def backward(ctx, d_values: Tensor):
        if ctx.is_late:
            rows, weight, wanted = ctx.saved_tensors
            _, d_rows, d_weight = _pieces(rows, weight, wanted, d_values, ctx.needs_input_grad[0], True)
        else:
            # In place, since the gradient of a weight is large; autograd then refuses a second backward pass over what
            # is saved here.
            factor = d_values if d_values.ndim == 0 else d_values.unsqueeze(1)
            d_rows, d_weight = (None if d is None else d.mul_(factor) for d in ctx.saved_tensors)
        return d_rows, d_weight, None, None, None


def _pieces(
    rows: Tensor, weight: Tensor, wanted: Tensor, factors: Tensor | None, needs_rows: bool, needs_weight: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """log p of each row's target, and the gradients with respect to rows and weight of their sum, or of their sum with
    `factors` (M,)."""
    values = rows.new_empty(len(rows), dtype=torch.promote_types(rows.dtype, torch.float32))
    d_rows = torch.empty_like(rows) if needs_rows else None
    d_weight = torch.zeros_like(weight) if needs_weight else None
    needs_gradient = needs_rows or needs_weight
    log_probs = _log_probs_in_cpp if _in_cpp(rows) else _log_probs
    size = max(1, min(len(rows), _MAX_LOGITS // len(weight)))
    memory = rows.new_empty(size, len(weight))  # once for all pieces: the system gives new memory page by page
    starts = range(0, len(rows), size)
    # On the meta device, where nothing is computed, all pieces but the last are the same: two stand for all.
    for start in {*starts[:1], *starts[-1:]} if rows.is_meta else starts:
        piece = slice(start, start + size)
        logits = torch.mm(rows[piece], weight.T, out=memory[: len(rows) - start])
        values[piece] = log_probs(logits, wanted[piece], None if factors is None else factors[piece], needs_gradient)
        if d_rows is not None:
            torch.mm(logits, weight, out=d_rows[piece])
        if d_weight is not None:
            d_weight.addmm_(logits.T, rows[piece])
    return values, d_rows, d_weight


def _log_probs(logits: Tensor, wanted: Tensor, factors: Tensor | None, needs_gradient: bool) -> Tensor:
    """log p of each row's target, (M,), in fp32 or float64. If `needs_gradient`, the logits (M, V) are replaced by the
    gradient of their sum, or of their sum with `factors` (M,)."""
    log_probs = logits.log_softmax(dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    at_target = wanted.unsqueeze(1)
    values = log_probs.gather(1, at_target).squeeze(1)
    if needs_gradient:
        gradient = log_probs.exp_().neg_()
        gradient.scatter_add_(1, at_target, gradient.new_ones(at_target.shape))
        if factors is not None:
            gradient *= factors.unsqueeze(1)
        logits.copy_(gradient)
    return values


def _log_probs_in_cpp(logits: Tensor, wanted: Tensor, factors: Tensor | None, needs_gradient: bool) -> Tensor:
    """As `_log_probs`, in one pass."""
    M, V = logits.shape
    assert ((wanted >= 0) & (wanted < V)).all(), "a target is a column of the logits"
    values = logits.new_empty(M, dtype=torch.float32)
    arguments = [logits, wanted, factors, values, M, V, int(needs_gradient), torch.get_num_threads()]
    kernel.call(_SOURCE, _FUNCTIONS[logits.dtype], arguments)
    return values


def _in_cpp(rows: Tensor) -> bool:
    if rows.device.type != "cpu" or rows.dtype not in _FUNCTIONS:
        return False
    return kernel.library_or_reason(_SOURCE)[0] is not None
