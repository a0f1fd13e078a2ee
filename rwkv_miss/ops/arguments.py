"""What the WKV ops ask of their arguments."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from rwkv_miss.errors import UserError


def state_dtype(v: Tensor) -> torch.dtype:
    """The dtype of the states that go with v: float64 for float64, otherwise float32."""
    return torch.float64 if v.dtype == torch.float64 else torch.float32


def check(
    op: str, v: Tensor, alike: Mapping[str, Tensor], u: Tensor | None, state: Tensor | None, seq_start: Tensor | None
) -> None:
    """Checks the shapes, dtypes and devices of an op's arguments.

    Args:
        op: the op's name, for the message.
        v: (B, T, H, N) in float32, bfloat16 or float64.
        alike: the other inputs of the same shape, dtype and device, by name.
        u: (H, N) in v's dtype, or None for an op without it.
        state: (B, H, N, N) in `state_dtype(v)`, or None.
        seq_start: bool (B, T), or None.

    Raises:
        UserError: an argument is not as said; the message names it, what was found and what was expected.
    """
    if v.dim() != 4 or v.shape[-1] == 0:
        raise UserError(f"{op}: v has shape {tuple(v.shape)}; expected (B, T, H, N) with N at least 1")
    if v.dtype not in (torch.float32, torch.bfloat16, torch.float64):
        raise UserError(f"{op}: v is {v.dtype}; expected float32, bfloat16 or float64")
    batch, n_steps, n_head, n = v.shape
    expected = {name: (x, tuple(v.shape), v.dtype) for name, x in alike.items()}
    if u is not None:
        expected["u"] = (u, (n_head, n), v.dtype)
    if state is not None:
        expected["state"] = (state, (batch, n_head, n, n), state_dtype(v))
    if seq_start is not None:
        expected["seq_start"] = (seq_start, (batch, n_steps), torch.bool)
    for name, (x, shape, dtype) in expected.items():
        if tuple(x.shape) != shape or x.dtype != dtype or x.device != v.device:
            raise UserError(
                f"{op}: {name} is {tuple(x.shape)} {x.dtype} on {x.device}; expected {shape} {dtype} on {v.device},"
                f" to go with v {tuple(v.shape)} {v.dtype}"
            )
