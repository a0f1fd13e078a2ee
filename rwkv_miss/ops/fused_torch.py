"""What the models compute between matrix products, as formulas of PyTorch operations: for float64 and for devices that
have no kernels. `rwkv_miss.ops.fused` says what each takes and returns."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def token_mix(x: Tensor, last: Tensor, seq_start: Tensor | None, mixes: Tensor, extra: Tensor | None) -> list[Tensor]:
    before = torch.cat([last.unsqueeze(1), x[:, :-1]], dim=1)
    if seq_start is not None:
        before = before.masked_fill(seq_start.unsqueeze(-1), 0)
    change = before - x
    shares = mixes if extra is None else mixes[:, None, None] + extra
    return [torch.addcmul(x, change, share) for share in shares]


def wkv7_arguments(
    k: Tensor, v: Tensor | None, v_first: Tensor | None, a: Tensor, nu: Tensor | None, k_k: Tensor, k_a: Tensor
) -> list[Tensor]:
    rate = torch.sigmoid(a)
    kk = F.normalize(k * k_k.view(k.shape[2:]), dim=-1, p=2.0, eps=1e-12)
    k = k * (1 + (rate - 1) * k_a.view(k.shape[2:]))
    if v is None or v_first is None or nu is None:
        return [k, -kk, kk * rate]
    return [k, v + (v_first - v) * torch.sigmoid(nu), -kk, kk * rate]


def wkv7_output(
    y: Tensor, r: Tensor, k: Tensor, v: Tensor, g: Tensor, weight: Tensor, bias: Tensor, r_k: Tensor, eps: float
) -> list[Tensor]:
    normed = _group_norm(y, weight, bias, eps)
    bonus = (r * k * r_k).sum(dim=-1, keepdim=True) * v
    return [(normed + bonus).view(g.shape) * g]


def relu_squared(x: Tensor) -> list[Tensor]:
    return [torch.relu(x).square()]


def wkv6_output(y: Tensor, g: Tensor, weight: Tensor, bias: Tensor, eps: float) -> list[Tensor]:
    return [_group_norm(y, weight, bias, eps).view(g.shape) * F.silu(g)]


def gated(gate: Tensor, x: Tensor) -> list[Tensor]:
    return [torch.sigmoid(gate) * x]


def _group_norm(y: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """y (B, T, H, N), each head normalised by itself."""
    rows = F.group_norm(y.reshape(-1, y.shape[2] * y.shape[3]), y.shape[2], weight, bias, eps)
    return rows.view(y.shape)
