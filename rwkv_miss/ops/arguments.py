"""What every recurrence asks of its arguments."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from rwkv_miss.errors import UserError


def state_dtype(v: Tensor) -> torch.dtype:
    return torch.float64 if v.dtype == torch.float64 else torch.float32


def check(
    op: str, v: Tensor, alike: Mapping[str, Tensor], u: Tensor | None, state: Tensor | None, seq_start: Tensor | None
) -> None:
    """UserError unless v is (B, T, H, N), `alike` have its shape, u (H, N), state (B, H, N, N), seq_start (B, T), and
    all their dtype and device."""
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
