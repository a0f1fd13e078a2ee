"""A version, added as CONTRIBUTING.md describes: RWKV-7 whose channel mix scales its keys by an embedding of its own,
as RWKV-7a's DeepEmbed does."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

from rwkv_miss.config import ModelConfig
from rwkv_miss.model.base import ChannelMixBase, Context, stacked, vector
from rwkv_miss.model.linear import Linear
from rwkv_miss.model.rwkv7 import RWKV7
from rwkv_miss.ops.fused import relu_squared, token_mix


class DeepChannelMix(ChannelMixBase):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.x_k = vector(config.n_embd)
        self.key = Linear(config.n_embd, config.dim_ffn)
        self.value = Linear(config.dim_ffn, config.n_embd)
        self.s_emb = nn.Embedding(config.vocab_size, config.dim_ffn)

    def forward(self, x: Tensor, context: Context, last: Tensor) -> tuple[Tensor, Tensor]:
        (x_k,) = token_mix(x, last, context.seq_start, stacked(self.x_k))
        k = relu_squared(self.key(x_k))
        return self.value(k * self.s_emb(context.tokens)), x[:, -1]


class DeepRWKV7(RWKV7):
    version = "7-deep"
    channel_mix = DeepChannelMix

    @classmethod
    def recognises(cls, keys: Collection[str]) -> bool:
        return "blocks.0.ffn.s_emb.weight" in keys

    @classmethod
    def initial(
        cls, part: str, shape: torch.Size, layer: int, config: ModelConfig, rng: torch.Generator
    ) -> Tensor | None:
        return torch.ones(shape) if part == "ffn.s_emb.weight" else super().initial(part, shape, layer, config, rng)
