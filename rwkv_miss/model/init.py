"""RWKV-7's initial weights, for training a model from nothing.

Every value follows BlinkDL's RWKV-LM, RWKV-v7/train_temp/src/model.py: the constructors of the time mix and the
channel mix, and `generate_init_weight`, which has the last word on the matrices.
"""

from __future__ import annotations

import math
import re

import torch
from torch import Tensor, nn

from rwkv_miss.config import ModelConfig
from rwkv_miss.model.rwkv7 import RWKV7

# Token-shift parameters are 1 - (i / C) ** (power * depth), where depth falls from 1 in the first layer towards 0.
_SHIFT_POWER = {"x_r": 0.2, "x_w": 0.9, "x_k": 0.7, "x_v": 0.7, "x_a": 0.9, "x_g": 0.2}
# Gains of the orthogonal matrices. With att.output and ffn.value at zero, each block starts as the identity.
_GAIN = {
    "att.receptance.weight": 1.0,
    "att.key.weight": 0.1,
    "att.value.weight": 1.0,
    "att.output.weight": 0.0,
    "ffn.key.weight": 1.0,
    "ffn.value.weight": 0.0,
}


def init_weights(config: ModelConfig, seed: int) -> dict[str, Tensor]:
    """The weights of an untrained RWKV-7, fp32, with the keys and shapes of a checkpoint.

    Args:
        config: `low_rank` needs the widths w, a, g and, with more than one layer, v.
        seed: of the random matrices; the same seed gives the same weights.
    """
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in RWKV7(config).named_parameters()}
    rng = torch.Generator().manual_seed(seed)
    return {name: _initial(name, shape, config, rng) for name, shape in shapes.items()}


def _initial(name: str, shape: torch.Size, config: ModelConfig, rng: torch.Generator) -> Tensor:
    if name == "emb.weight":
        return torch.empty(shape).uniform_(-1e-4, 1e-4, generator=rng)
    if name == "head.weight":
        return _orthogonal(shape, 0.5 * math.sqrt(max(config.vocab_size / config.n_embd, 1)), rng)
    if re.search(r"\bln(0|1|2|_out)\.", name):
        return torch.ones(shape) if name.endswith(".weight") else torch.zeros(shape)
    _, layer, part = name.split(".", 2)
    depth = int(layer) / config.n_layer
    if part in _GAIN:
        return _orthogonal(shape, _GAIN[part], rng)
    if part == "ffn.x_k":
        return _shift(shape, (1 - depth) ** 4)
    return _time_mix(part.removeprefix("att."), shape, int(layer), config, rng)


def _time_mix(part: str, shape: torch.Size, layer: int, config: ModelConfig, rng: torch.Generator) -> Tensor:
    C, N = config.n_embd, config.head_size
    channel = torch.arange(C) / (C - 1)  # 0 to 1 over all channels
    in_head = (torch.arange(C) % N) / (N - 1) * 2 - 1  # -1 to 1 over a head's channels
    zigzag = in_head * in_head.abs()
    if part in _SHIFT_POWER:
        return _shift(shape, _SHIFT_POWER[part] * (1 - layer / config.n_layer))
    if part == "w0":
        # z of the decay exp(-e^-0.5 sigmoid(z)), from -8 (0.9998) to 3 (0.56); the deeper, the fewer fast channels.
        power = 1 + (layer / max(config.n_layer - 1, 1)) ** 0.3
        return (-5.5 + 6 * channel.pow(power) + 2.5 * zigzag).view(shape)
    if part == "a0":
        return (-0.19 + 0.3 * zigzag + 0.4 * (channel - 0.5)).view(shape)
    if part == "v0":
        return (0.73 - 0.4 * (channel - 0.5)).view(shape)
    if part == "k_k":
        return (0.71 - 0.1 * (channel - 0.5)).view(shape)
    if part == "k_a":
        return torch.full(shape, 1.02)
    if part == "r_k":
        return torch.full(shape, -0.04)
    if part == "ln_x.weight":
        return torch.full(shape, ((1 + layer) / config.n_layer) ** 0.7)
    if part in ("w1", "a1", "v1", "g1", "ln_x.bias"):
        return torch.zeros(shape)
    assert part in ("w2", "a2", "v2", "g2"), part
    return _orthogonal(shape, 0.1 * math.sqrt(max(shape[0] / shape[1], 1)), rng)


def _shift(shape: torch.Size, power: float) -> Tensor:
    return 1 - (torch.arange(shape.numel()) / shape.numel()).pow(power).view(shape)


def _orthogonal(shape: torch.Size, gain: float, rng: torch.Generator) -> Tensor:
    return nn.init.orthogonal_(torch.empty(shape), gain=gain, generator=rng)
