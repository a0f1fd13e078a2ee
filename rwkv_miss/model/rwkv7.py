"""RWKV-7 "Goose": the whole architecture.

Equations: RWKV-7 paper (arXiv 2503.14456, section 4 and appendix), BlinkDL's RWKV-LM (RWKV-v7) for the names of
parameters, which are the checkpoint's keys. B batch, T tokens, C = n_embd, H heads of N = head_size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rwkv_miss.config import ModelConfig
from rwkv_miss.model.rwkv import RWKV, matrix, token_shift, vector
from rwkv_miss.model.segments import run_from
from rwkv_miss.ops import wkv7

# A step of r, z, k, v, a, b that leaves the state as it is: decay 1, nothing removed or written.
_PADDING = (0.0, -1e4, 0.0, 0.0, 0.0, 0.0)


class TimeMix(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        C, rank = config.n_embd, config.low_rank
        self.layer, self.n_head, self.head_size = layer, config.n_head, config.head_size
        self.x_r, self.x_w, self.x_k = vector(C), vector(C), vector(C)
        self.x_v, self.x_a, self.x_g = vector(C), vector(C), vector(C)
        self.w0, self.w1, self.w2 = vector(C), matrix(C, rank["w"]), matrix(rank["w"], C)
        self.a0, self.a1, self.a2 = vector(C), matrix(C, rank["a"]), matrix(rank["a"], C)
        if layer > 0:
            self.v0, self.v1, self.v2 = vector(C), matrix(C, rank["v"]), matrix(rank["v"], C)
        self.g1, self.g2 = matrix(C, rank["g"]), matrix(rank["g"], C)
        self.k_k, self.k_a = vector(C), vector(C)
        self.r_k = matrix(config.n_head, config.head_size)
        self.receptance = nn.Linear(C, C, bias=False)
        self.key = nn.Linear(C, C, bias=False)
        self.value = nn.Linear(C, C, bias=False)
        self.output = nn.Linear(C, C, bias=False)
        self.ln_x = nn.GroupNorm(config.n_head, C, eps=64e-5)
        self.register_parameter("time_state", None)  # see model/initial_state.py

    def forward(
        self,
        x: Tensor,
        last: Tensor,
        wkv_state: Tensor | None,
        v_first: Tensor | None,
        seq_start: Tensor | None,
        wkv_backend: str,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x (B, T, C) -> out (B, T, C), the new shift (B, C) and WKV state (None: the initial one), and v_first
        (layer 0's values)."""
        B, T, C = x.shape
        heads = (B, T, self.n_head, self.head_size)
        xx = token_shift(x, last, seq_start) - x
        x_r, x_w, x_k, x_v, x_a, x_g = (
            torch.addcmul(x, xx, mix) for mix in (self.x_r, self.x_w, self.x_k, self.x_v, self.x_a, self.x_g)
        )
        r = self.receptance(x_r)
        k = self.key(x_k)
        v = self.value(x_v)
        z = self.w0 + torch.tanh(x_w @ self.w1) @ self.w2  # the decay is exp(-e^{-0.5} sigmoid(z))
        a = torch.sigmoid(self.a0 + (x_a @ self.a1) @ self.a2)  # in-context learning rate
        g = torch.sigmoid(x_g @ self.g1) @ self.g2
        if self.layer == 0:
            v_first = v
        else:
            v = v + (v_first - v) * torch.sigmoid(self.v0 + (x_v @ self.v1) @ self.v2)
        kk = F.normalize((k * self.k_k).view(heads), dim=-1, p=2.0, eps=1e-12)
        k = k * (1 + (a - 1) * self.k_a)

        r, k, v, a = r.view(heads), k.view(heads), v.view(heads), a.view(heads)

        def op(x: Sequence[Tensor], state: Tensor | None, starts: Tensor | None) -> tuple[Tensor, Tensor]:
            return wkv7(*x, state, starts, wkv_backend)

        inputs = (r, z.view(heads), k, v, -kk, kk * a)
        y, wkv_state = run_from(op, inputs, _PADDING, wkv_state, self.time_state, seq_start)
        y = self.ln_x(y.reshape(B * T, C)).view(heads)
        y = y + (r * k * self.r_k).sum(dim=-1, keepdim=True) * v
        return self.output(y.view(B, T, C) * g), x[:, -1], wkv_state, v_first


class ChannelMix(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.x_k = vector(config.n_embd)
        self.key = nn.Linear(config.n_embd, config.dim_ffn, bias=False)
        self.value = nn.Linear(config.dim_ffn, config.n_embd, bias=False)

    def forward(self, x: Tensor, last: Tensor, seq_start: Tensor | None) -> tuple[Tensor, Tensor]:
        xx = token_shift(x, last, seq_start) - x
        k = torch.relu(self.key(torch.addcmul(x, xx, self.x_k))).square()
        return self.value(k), x[:, -1]


class RWKV7(RWKV):
    time_mix, channel_mix = TimeMix, ChannelMix
    linears = ("att.receptance", "att.key", "att.value", "att.output", "ffn.key", "ffn.value")
    # Layer 0 mixes no v_first: a checkpoint may hold these all the same, and nothing uses them.
    unused = ("blocks.0.att.v0", "blocks.0.att.v1", "blocks.0.att.v2")
