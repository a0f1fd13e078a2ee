"""RWKV-6 "Finch": the whole architecture, and all that is true of this version alone.

Equations: the Eagle and Finch paper (arXiv 2404.05892, section 4), BlinkDL's RWKV-LM (RWKV-v5, x060) for the names of
parameters, which are the checkpoint's keys. B batch, T tokens, C = n_embd, H heads of N = head_size.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from rwkv_miss.config import ModelConfig
from rwkv_miss.model.base import RWKV, ChannelMixBase, Context, Sizes, TimeMixBase, matrix, stacked, vector
from rwkv_miss.model.documents import run_from
from rwkv_miss.model.initial_values import orthogonal, shift
from rwkv_miss.model.linear import Linear
from rwkv_miss.ops import wkv6
from rwkv_miss.ops.fused import gated, relu_squared, token_mix, wkv6_output
from rwkv_miss.ops.low_rank import LowRank, low_rank

# A step of r, k, v, w that leaves the state as it is: decay 1, nothing written.
_PADDING = (0.0, 0.0, 0.0, -1e4)


class TimeMix(TimeMixBase):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        C, rank = config.n_embd, config.low_rank
        self.n_head, self.head_size = config.n_head, config.head_size
        self.time_maa_x, self.time_maa_w, self.time_maa_k = vector(C), vector(C), vector(C)
        self.time_maa_v, self.time_maa_r, self.time_maa_g = vector(C), vector(C), vector(C)
        self.time_maa_w1, self.time_maa_w2 = matrix(C, 5 * rank["maa"]), matrix(5, rank["maa"], C)
        self.time_decay = vector(C)
        self.time_decay_w1, self.time_decay_w2 = matrix(C, rank["decay"]), matrix(rank["decay"], C)
        self.time_faaaa = matrix(config.n_head, config.head_size)
        self.receptance = Linear(C, C)
        self.key = Linear(C, C)
        self.value = Linear(C, C)
        self.output = Linear(C, C)
        self.gate = Linear(C, C)
        self.ln_x = nn.GroupNorm(config.n_head, C, eps=64e-5)
        self.register_parameter("time_state", None)

    def forward(
        self, x: Tensor, context: Context, last: Tensor, wkv: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """See `TimeMixBase`; layer 0 passes nothing on."""
        B, T, C = x.shape
        heads = (B, T, self.n_head, self.head_size)
        (x_x,) = token_mix(x, last, context.seq_start, stacked(self.time_maa_x))
        low = torch.tanh(x_x @ self.time_maa_w1)  # (B, T, 5 L)
        low = low.view(B * T, 5, -1).transpose(0, 1)  # (5, B T, L): for w, k, v, r, g
        extra = (low @ self.time_maa_w2).view(5, B, T, C)
        mixes = stacked(self.time_maa_w, self.time_maa_k, self.time_maa_v, self.time_maa_r, self.time_maa_g)
        x_w, x_k, x_v, x_r, x_g = token_mix(x, last, context.seq_start, mixes, extra)
        r = self.receptance(x_r)
        k = self.key(x_k)
        v = self.value(x_v)
        g = self.gate(x_g)
        # The decay is exp(-exp(w)).
        [w] = low_rank([LowRank(x_w, self.time_decay_w1, self.time_decay_w2, self.time_decay, "tanh")])

        r, k, v, w = r.view(heads), k.view(heads), v.view(heads), w.view(heads)

        def op(x: Sequence[Tensor], state: Tensor | None, starts: Tensor | None) -> tuple[Tensor, Tensor]:
            r, k, v, w = x
            return wkv6(r, k, v, w, self.time_faaaa, state, starts, context.wkv_backend)

        y, wkv = run_from(op, (r, k, v, w), _PADDING, wkv, self.time_state, context.seq_start)
        y = wkv6_output(y, g, self.ln_x.weight, self.ln_x.bias, self.ln_x.eps)
        return self.output(y), x[:, -1], wkv, None


class ChannelMix(ChannelMixBase):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.time_maa_k, self.time_maa_r = vector(config.n_embd), vector(config.n_embd)
        self.key = Linear(config.n_embd, config.dim_ffn)
        self.receptance = Linear(config.n_embd, config.n_embd)
        self.value = Linear(config.dim_ffn, config.n_embd)

    def forward(self, x: Tensor, context: Context, last: Tensor) -> tuple[Tensor, Tensor]:
        x_k, x_r = token_mix(x, last, context.seq_start, stacked(self.time_maa_k, self.time_maa_r))
        return gated(self.receptance(x_r), self.value(relu_squared(self.key(x_k)))), x[:, -1]


class RWKV6(RWKV):
    version, op = 6, "wkv6"
    time_mix, channel_mix = TimeMix, ChannelMix
    linears = (
        *("att.receptance", "att.key", "att.value", "att.gate", "att.output"),
        *("ffn.key", "ffn.receptance", "ffn.value"),
    )
    # RWKV-LM, configure_optimizers with layerwise_lr in RWKV-v5/src/model.py.
    lr_scales: ClassVar[dict[str, float]] = {"att.time_decay": 2.0}
    key_first = True
    runtimes_find_state = True

    @classmethod
    def recognises(cls, keys: Collection[str]) -> bool:
        return "blocks.0.att.time_maa_x" in keys

    @classmethod
    def find_sizes(cls, shape: Callable[[str], torch.Size], keys: Collection[str], n_layer: int) -> Sizes:
        n_head, head_size = shape("blocks.0.att.time_faaaa")
        low_rank = {"maa": shape("blocks.0.att.time_maa_w1")[1] // 5, "decay": shape("blocks.0.att.time_decay_w1")[1]}
        return Sizes("blocks.0.att.time_faaaa", n_head, head_size, low_rank)

    @classmethod
    def default_sizes(cls, n_embd: int) -> tuple[int, dict[str, int]]:
        """dim_ffn is 3.5 n_embd rounded down to a multiple of 32. The widths are the constants of x060, doubled from
        4096 on, as the published World models of that size (7B, 14B) have them."""
        factor = 2 if n_embd >= 4096 else 1
        return 7 * n_embd // 2 // 32 * 32, {"maa": 32 * factor, "decay": 64 * factor}

    @classmethod
    def initial(
        cls, part: str, shape: torch.Size, layer: int, config: ModelConfig, rng: torch.Generator
    ) -> Tensor | None:
        """BlinkDL's values (RWKV-LM, RWKV-v5/src/model.py, x060; the channel mix is that since 2024-11). For channel i
        of C, c is i / (C - 1); "late" goes from 0 in the first layer to 1 in the last, "early" is 1 - layer / n_layer.

            time_maa_x, _w, _k / _r, _g      1 - (i / C) ** (early / 0.5 early)
            time_maa_v                       1 - (i / C) ** early - 0.3 late
            time_decay                       -6 + 5 c ** (0.7 + 1.3 late)
            time_faaaa                       late (1 - c) + 0.1, -0.1 or 0 (in turn 0, 0.1, -0.1)
            time_maa_w1, time_decay_w1       0; time_maa_w2, time_decay_w2 uniform in +-0.01
            ffn.time_maa_k, ffn.time_maa_r   1 - (i / C) ** (early ** 3)

        The linears are orthogonal; with att.output, ffn.receptance and ffn.value at zero, each block starts as the
        identity.
        """
        early, late = 1 - layer / config.n_layer, layer / max(config.n_layer - 1, 1)
        gains = {
            **{"att.receptance.weight": 1.0, "att.key.weight": 0.1, "att.value.weight": 1.0},
            **{"att.gate.weight": 0.1, "att.output.weight": 0.0},
            **{"ffn.key.weight": 1.0, "ffn.receptance.weight": 0.0, "ffn.value.weight": 0.0},
        }
        if part in gains:
            return orthogonal(shape, gains[part], rng)
        if part in ("ffn.time_maa_k", "ffn.time_maa_r"):
            return shift(shape, early**3)
        name = part.removeprefix("att.")
        if name in ("time_maa_x", "time_maa_w", "time_maa_k"):
            return shift(shape, early)
        if name in ("time_maa_r", "time_maa_g"):
            return shift(shape, 0.5 * early)
        if name == "time_maa_v":
            return shift(shape, early) - 0.3 * late
        channel = torch.arange(config.n_embd) / (config.n_embd - 1)
        if name == "time_decay":
            # w of the decay exp(-exp(w)), from -6 (0.998) to -1 (0.69); the deeper, the fewer fast channels.
            return (-6 + 5 * channel.pow(0.7 + 1.3 * late)).view(shape)
        if name == "time_faaaa":
            zigzag = (torch.arange(len(channel)) + 1) % 3 - 1
            return (late * (1 - channel) + 0.1 * zigzag).view(shape)
        if name in ("time_maa_w1", "time_decay_w1"):
            return torch.zeros(shape)
        if name in ("time_maa_w2", "time_decay_w2"):
            return torch.empty(shape).uniform_(-0.01, 0.01, generator=rng)
        return None
