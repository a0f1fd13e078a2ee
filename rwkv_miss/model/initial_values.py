"""Functions that the versions make their initial weights from (`RWKV.initial`)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rwkv_miss.config import ModelConfig


def shift(shape: torch.Size, power: float) -> Tensor:
    """1 - (i / C) ** power for channel i of C: the previous token's weight in the token shift."""
    return 1 - (torch.arange(shape.numel()) / shape.numel()).pow(power).view(shape)


def orthogonal(shape: torch.Size, gain: float, rng: torch.Generator) -> Tensor:
    """A random matrix of that shape whose singular values are all `gain`."""
    return nn.init.orthogonal_(torch.empty(shape), gain=gain, generator=rng)


def head_zigzag(config: ModelConfig) -> Tensor:
    """s |s| for each channel, (n_embd,), with s going from -1 to 1 over each head."""
    s = (torch.arange(config.n_embd) % config.head_size) / (config.head_size - 1) * 2 - 1
    return s * s.abs()
