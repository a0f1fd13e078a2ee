"""RWKV-7 "Goose": the whole architecture, and all that is true of this version alone.

Equations: RWKV-7 paper (arXiv 2503.14456, section 4 and appendix), BlinkDL's RWKV-LM (RWKV-v7) for the names of
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
from rwkv_miss.model.initial_values import head_zigzag, orthogonal, shift
from rwkv_miss.model.linear import Linear
from rwkv_miss.ops import wkv7
from rwkv_miss.ops.fused import relu_squared, token_mix, wkv7_arguments, wkv7_output
from rwkv_miss.ops.low_rank import LowRank, low_rank

# A step of r, z, k, v, a, b that leaves the state as it is: decay 1, nothing removed or written.
_PADDING = (0.0, -1e4, 0.0, 0.0, 0.0, 0.0)


class TimeMix(TimeMixBase):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        C, rank = config.n_embd, config.low_rank
        self.n_head, self.head_size = config.n_head, config.head_size
        self.x_r, self.x_w, self.x_k = vector(C), vector(C), vector(C)
        self.x_v, self.x_a, self.x_g = vector(C), vector(C), vector(C)
        self.w0, self.w1, self.w2 = vector(C), matrix(C, rank["w"]), matrix(rank["w"], C)
        self.a0, self.a1, self.a2 = vector(C), matrix(C, rank["a"]), matrix(rank["a"], C)
        if layer > 0:
            self.v0, self.v1, self.v2 = vector(C), matrix(C, rank["v"]), matrix(rank["v"], C)
        self.g1, self.g2 = matrix(C, rank["g"]), matrix(rank["g"], C)
        self.k_k, self.k_a = vector(C), vector(C)
        self.r_k = matrix(config.n_head, config.head_size)
        self.receptance = Linear(C, C)
        self.key = Linear(C, C)
        self.value = Linear(C, C)
        self.output = Linear(C, C)
        self.ln_x = nn.GroupNorm(config.n_head, C, eps=64e-5)
        self.register_parameter("time_state", None)

    def forward(
        self, x: Tensor, context: Context, last: Tensor, wkv: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """See `TimeMixBase`; layer 0 passes on its values (B, T, H, N)."""
        heads = (*x.shape[:2], self.n_head, self.head_size)
        mixes = stacked(self.x_r, self.x_w, self.x_k, self.x_v, self.x_a, self.x_g)
        x_r, x_w, x_k, x_v, x_a, x_g = token_mix(x, last, context.seq_start, mixes)
        r = self.receptance(x_r).view(heads)
        k = self.key(x_k).view(heads)
        v = self.value(x_v).view(heads)
        v_first = context.first
        parts = [
            LowRank(x_w, self.w1, self.w2, self.w0, "tanh"),
            LowRank(x_a, self.a1, self.a2, self.a0, "none"),
            LowRank(x_g, self.g1, self.g2, None, "sigmoid"),
        ]
        if v_first is not None:
            parts.append(LowRank(x_v, self.v1, self.v2, self.v0, "none"))
        # The decay is exp(-e^{-0.5} sigmoid(z)), the in-context learning rate sigmoid(a).
        z, a, g, *rest = low_rank(parts)
        nu = rest[0].view(heads) if rest else None
        k, v, minus_kk, kk_rate = wkv7_arguments(k, v, v_first, a.view(heads), nu, self.k_k, self.k_a)

        def op(x: Sequence[Tensor], state: Tensor | None, starts: Tensor | None) -> tuple[Tensor, Tensor]:
            r, z, k, v, a, b = x
            return wkv7(r, z, k, v, a, b, state, starts, context.wkv_backend)

        inputs = (r, z.view(heads), k, v, minus_kk, kk_rate)
        y, wkv = run_from(op, inputs, _PADDING, wkv, self.time_state, context.seq_start)
        y = wkv7_output(y, r, k, v, g, self.ln_x.weight, self.ln_x.bias, self.r_k, self.ln_x.eps)
        return self.output(y), x[:, -1], wkv, v if v_first is None else v_first


class ChannelMix(ChannelMixBase):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.x_k = vector(config.n_embd)
        self.key = Linear(config.n_embd, config.dim_ffn)
        self.value = Linear(config.dim_ffn, config.n_embd)

    def forward(self, x: Tensor, context: Context, last: Tensor) -> tuple[Tensor, Tensor]:
        (x_k,) = token_mix(x, last, context.seq_start, stacked(self.x_k))
        return self.value(relu_squared(self.key(x_k))), x[:, -1]


class RWKV7(RWKV):
    version, op = 7, "wkv7"
    time_mix, channel_mix = TimeMix, ChannelMix
    linears = ("att.receptance", "att.key", "att.value", "att.output", "ffn.key", "ffn.value")
    # Layer 0 does not use v_first, but BlinkDL's files hold its parameters all the same, and his trainer asks for them.
    unused = ("blocks.0.att.v0", "blocks.0.att.v1", "blocks.0.att.v2")
    # RWKV-LM, configure_optimizers in RWKV-v7/train_temp/src/model.py.
    lr_scales: ClassVar[dict[str, float]] = {"att.w0": 2.0}
    key_first = False
    runtimes_find_state = False

    @classmethod
    def recognises(cls, keys: Collection[str]) -> bool:
        return "blocks.0.att.k_k" in keys and not any(".ffn.s_emb" in key for key in keys)  # s_emb: RWKV-7a, 7b

    @classmethod
    def find_sizes(cls, shape: Callable[[str], torch.Size], keys: Collection[str], n_layer: int) -> Sizes:
        n_head, head_size = shape("blocks.0.att.r_k")
        low_rank = {name: shape(f"blocks.0.att.{name}1")[1] for name in ("w", "a", "g")}
        v1 = f"blocks.{min(n_layer - 1, 1)}.att.v1"
        if n_layer > 1 or v1 in keys:  # layer 0 has no use for it and may lack it
            low_rank["v"] = shape(v1)[1]
        return Sizes("blocks.0.att.r_k", n_head, head_size, low_rank)

    @classmethod
    def default_sizes(cls, n_embd: int) -> tuple[int, dict[str, int]]:
        """Widths: a multiple of 32 near 2.5, 2.5, 1.7 or 5 times sqrt(n_embd) (RWKV-v7/train_temp/src/model.py)."""
        scales = {"w": 2.5, "a": 2.5, "v": 1.7, "g": 5}
        return 4 * n_embd, {name: max(32, round(x * n_embd**0.5 / 32) * 32) for name, x in scales.items()}

    @classmethod
    def unused_shapes(cls, config: ModelConfig) -> dict[str, torch.Size]:
        C, rank = config.n_embd, config.low_rank["v"]
        shapes = torch.Size((1, 1, C)), torch.Size((C, rank)), torch.Size((rank, C))
        return dict(zip(cls.unused, shapes, strict=True))

    @classmethod
    def initial(
        cls, part: str, shape: torch.Size, layer: int, config: ModelConfig, rng: torch.Generator
    ) -> Tensor | None:
        """BlinkDL's values (RWKV-LM, RWKV-v7/train_temp/src/model.py). For channel i of C, c is i / (C - 1); "late"
        goes from 0 in the first layer to 1 in the last, "early" is 1 - layer / n_layer; zigzag is s |s| with s from -1
        to 1 over a head.

            x_r, x_g / x_k, x_v / x_w, x_a   1 - (i / C) ** (0.2 / 0.7 / 0.9 early)
            w0                               -5.5 + 6 c ** (1 + late ** 0.3) + 2.5 zigzag
            a0, v0                           -0.19 + 0.3 zigzag + 0.4 (c - 0.5), 0.73 - 0.4 (c - 0.5)
            k_k, k_a, r_k                    0.71 - 0.1 (c - 0.5), 1.02, -0.04
            w1, a1, v1, g1                   0; w2, a2, v2, g2 orthogonal, gain 0.1
            ffn.x_k                          1 - (i / C) ** (early ** 4)

        The linears are orthogonal; with att.output and ffn.value at zero, each block starts as the identity.
        """
        early, late = 1 - layer / config.n_layer, layer / max(config.n_layer - 1, 1)
        gains = {
            **{"att.receptance.weight": 1.0, "att.key.weight": 0.1, "att.value.weight": 1.0, "att.output.weight": 0.0},
            **{"ffn.key.weight": 1.0, "ffn.value.weight": 0.0},
        }
        if part in gains:
            return orthogonal(shape, gains[part], rng)
        powers = {"x_r": 0.2, "x_g": 0.2, "x_k": 0.7, "x_v": 0.7, "x_w": 0.9, "x_a": 0.9}
        if part == "ffn.x_k":
            return shift(shape, early**4)
        name = part.removeprefix("att.")
        if name in powers:
            return shift(shape, powers[name] * early)
        channel = torch.arange(config.n_embd) / (config.n_embd - 1)
        zigzag = head_zigzag(config)
        if name == "w0":
            # z of the decay exp(-e^-0.5 sigmoid(z)), from -8 (0.9998) to 3 (0.56); the deeper, the fewer fast channels.
            return (-5.5 + 6 * channel.pow(1 + late**0.3) + 2.5 * zigzag).view(shape)
        if name == "a0":
            return (-0.19 + 0.3 * zigzag + 0.4 * (channel - 0.5)).view(shape)
        if name == "v0":
            return (0.73 - 0.4 * (channel - 0.5)).view(shape)
        if name == "k_k":
            return (0.71 - 0.1 * (channel - 0.5)).view(shape)
        if name == "k_a":
            return torch.full(shape, 1.02)
        if name == "r_k":
            return torch.full(shape, -0.04)
        if name in ("w1", "a1", "v1", "g1"):
            return torch.zeros(shape)
        if name in ("w2", "a2", "v2", "g2"):
            return orthogonal(shape, 0.1 * max(shape[0] / shape[1], 1) ** 0.5, rng)
        return None
