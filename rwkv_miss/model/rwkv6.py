"""RWKV-6 "Finch": the whole architecture.

Equations: the Eagle and Finch paper (arXiv 2404.05892, section 4), BlinkDL's RWKV-LM (RWKV-v5, x060) for the names of
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
from rwkv_miss.ops import wkv6

# A step of r, k, v, w that leaves the state as it is: decay 1, nothing written.
_PADDING = (0.0, 0.0, 0.0, -1e4)


class TimeMix(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        C, rank = config.n_embd, config.low_rank
        self.n_head, self.head_size = config.n_head, config.head_size
        self.time_maa_x, self.time_maa_w, self.time_maa_k = vector(C), vector(C), vector(C)
        self.time_maa_v, self.time_maa_r, self.time_maa_g = vector(C), vector(C), vector(C)
        self.time_maa_w1, self.time_maa_w2 = matrix(C, 5 * rank["maa"]), matrix(5, rank["maa"], C)
        self.time_decay = vector(C)
        self.time_decay_w1, self.time_decay_w2 = matrix(C, rank["decay"]), matrix(rank["decay"], C)
        self.time_faaaa = matrix(config.n_head, config.head_size)
        self.receptance = nn.Linear(C, C, bias=False)
        self.key = nn.Linear(C, C, bias=False)
        self.value = nn.Linear(C, C, bias=False)
        self.output = nn.Linear(C, C, bias=False)
        self.gate = nn.Linear(C, C, bias=False)
        self.ln_x = nn.GroupNorm(config.n_head, C, eps=64e-5)
        self.register_parameter("time_state", None)  # see model/initial_state.py

    def forward(
        self,
        x: Tensor,
        last: Tensor,
        wkv_state: Tensor | None,
        v_first: None,
        seq_start: Tensor | None,
        wkv_backend: str,
    ) -> tuple[Tensor, Tensor, Tensor, None]:
        """x (B, T, C) -> out (B, T, C), the new shift (B, C) and WKV state (None: the initial one); v_first is
        RWKV-7's alone."""
        B, T, C = x.shape
        heads = (B, T, self.n_head, self.head_size)
        xx = token_shift(x, last, seq_start) - x
        low = torch.tanh(torch.addcmul(x, xx, self.time_maa_x) @ self.time_maa_w1)  # (B, T, 5 L)
        low = low.view(B * T, 5, -1).transpose(0, 1)  # (5, B T, L): for w, k, v, r, g
        m_w, m_k, m_v, m_r, m_g = (low @ self.time_maa_w2).view(5, B, T, C).unbind(0)
        x_w = x + xx * (self.time_maa_w + m_w)
        r = self.receptance(x + xx * (self.time_maa_r + m_r))
        k = self.key(x + xx * (self.time_maa_k + m_k))
        v = self.value(x + xx * (self.time_maa_v + m_v))
        g = F.silu(self.gate(x + xx * (self.time_maa_g + m_g)))
        w = self.time_decay + torch.tanh(x_w @ self.time_decay_w1) @ self.time_decay_w2  # decay exp(-exp(w))

        r, k, v, w = r.view(heads), k.view(heads), v.view(heads), w.view(heads)

        def op(x: Sequence[Tensor], state: Tensor | None, starts: Tensor | None) -> tuple[Tensor, Tensor]:
            return wkv6(*x, self.time_faaaa, state, starts, wkv_backend)

        inputs = (r, k, v, w)
        y, wkv_state = run_from(op, inputs, _PADDING, wkv_state, self.time_state, seq_start)
        y = self.ln_x(y.reshape(B * T, C)).view(B, T, C)
        return self.output(y * g), x[:, -1], wkv_state, None


class ChannelMix(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.time_maa_k, self.time_maa_r = vector(config.n_embd), vector(config.n_embd)
        self.key = nn.Linear(config.n_embd, config.dim_ffn, bias=False)
        self.receptance = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.value = nn.Linear(config.dim_ffn, config.n_embd, bias=False)

    def forward(self, x: Tensor, last: Tensor, seq_start: Tensor | None) -> tuple[Tensor, Tensor]:
        xx = token_shift(x, last, seq_start) - x
        k = torch.relu(self.key(torch.addcmul(x, xx, self.time_maa_k))).square()
        r = torch.sigmoid(self.receptance(torch.addcmul(x, xx, self.time_maa_r)))
        return r * self.value(k), x[:, -1]


class RWKV6(RWKV):
    time_mix, channel_mix = TimeMix, ChannelMix
    linears = (
        *("att.receptance", "att.key", "att.value", "att.gate", "att.output"),
        *("ffn.key", "ffn.receptance", "ffn.value"),
    )
