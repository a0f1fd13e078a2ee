"""The shapes of values that the versions' initial weights are made of (`RWKV.initial`)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rwkv_miss.config import ModelConfig


def shift(shape: torch.Size, power: float) -> Tensor:
    """1 - (i / C) ** power for channel i of C: how much of the token before enters the token shift's mix."""
    return 1 - (torch.arange(shape.numel()) / shape.numel()).pow(power).view(shape)


def orthogonal(shape: torch.Size, gain: float, rng: torch.Generator) -> Tensor:
    """A random matrix of that shape whose singular values are all `gain`."""
    return nn.init.orthogonal_(torch.empty(shape), gain=gain, generator=rng)


def head_zigzag(config: ModelConfig) -> Tensor:
    """s |s| for each channel, (n_embd,), with s going from -1 to 1 over each head."""
    s = (torch.arange(config.n_embd) % config.head_size) / (config.head_size - 1) * 2 - 1
    return s * s.abs()
