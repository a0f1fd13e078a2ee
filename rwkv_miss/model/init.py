"""The weights of a model not yet trained, for pre-training from nothing.

Every value follows BlinkDL's RWKV-LM: RWKV-v7/train_temp/src/model.py for RWKV-7 (x070), RWKV-v5/src/model.py for
RWKV-6 (x060): the constructors of the time mix and the channel mix, and `generate_init_weight`, which has the last
word on the matrices. Both versions: emb.weight uniform in +-1e-4; norms 1 and 0, but ln_x.weight
((1 + layer) / n_layer) ** 0.7; head.weight orthogonal.

In the tables below c is the channel from 0 to 1 (i / (C - 1)), i / C the same without its end; "late" goes from 0
in the first layer to 1 in the last, "early" is 1 - layer / n_layer; zigzag is s |s| with s from -1 to 1 over a head.

RWKV-7   x_r, x_g / x_k, x_v / x_w, x_a   1 - (i / C) ** (0.2 / 0.7 / 0.9 early)
         w0                               -5.5 + 6 c ** (1 + late ** 0.3) + 2.5 zigzag
         a0, v0                           -0.19 + 0.3 zigzag + 0.4 (c - 0.5), 0.73 - 0.4 (c - 0.5)
         k_k, k_a, r_k                    0.71 - 0.1 (c - 0.5), 1.02, -0.04
         w1, a1, v1, g1                   0; w2, a2, v2, g2 orthogonal, gain 0.1
         ffn.x_k                          1 - (i / C) ** (early ** 4)
RWKV-6   time_maa_x, _w, _k / _r, _g      1 - (i / C) ** (early / 0.5 early)
         time_maa_v                       1 - (i / C) ** early - 0.3 late
         time_decay                       -6 + 5 c ** (0.7 + 1.3 late)
         time_faaaa                       late (1 - c) + 0.1, -0.1 or 0 (in turn 0, 0.1, -0.1)
         time_maa_w1, time_decay_w1       0; time_maa_w2, time_decay_w2 uniform in +-0.01
         ffn.time_maa_k, ffn.time_maa_r   1 - (i / C) ** early
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from rwkv_miss.checkpoint import TensorSpec, parse_dtype, write_pth
from rwkv_miss.config import ModelConfig
from rwkv_miss.errors import UserError
from rwkv_miss.files import atomic_write
from rwkv_miss.model import MODELS

# Exponents of the token shift's parameters, as shares of "early".
_SHIFT_POWER = {
    **{"x_r": 0.2, "x_w": 0.9, "x_k": 0.7, "x_v": 0.7, "x_a": 0.9, "x_g": 0.2},
    **{"time_maa_x": 1.0, "time_maa_w": 1.0, "time_maa_k": 1.0, "time_maa_r": 0.5, "time_maa_g": 0.5},
}
# Gains of the orthogonal matrices. With att.output and ffn.value at zero, each block starts as the identity.
_GAIN = {
    "att.receptance.weight": 1.0,
    "att.key.weight": 0.1,
    "att.value.weight": 1.0,
    "att.gate.weight": 0.1,
    "att.output.weight": 0.0,
    "ffn.key.weight": 1.0,
    "ffn.receptance.weight": 0.0,
    "ffn.value.weight": 0.0,
}


def new_config(
    version: int,
    n_layer: int,
    n_embd: int,
    vocab_size: int,
    head_size: int = 64,
    dim_ffn: int | None = None,
    low_rank: dict[str, int] | None = None,
) -> ModelConfig:
    """The sizes of a model to be made, those not given as BlinkDL's training code chooses them: a dim_ffn of
    4 n_embd (RWKV-7) or 3.5 n_embd (RWKV-6, rounded down to a multiple of 32) and the widths of `_low_rank`.

    Args:
        low_rank: widths to have instead, by their names in `ModelConfig.low_rank`.

    Raises:
        UserError: every size that no model can have.
    """
    if version not in MODELS:
        raise UserError(f"version is {version}; RWKV-6 and RWKV-7 can be made")
    if dim_ffn is None:
        dim_ffn = 4 * n_embd if version == 7 else 7 * n_embd // 2 // 32 * 32
    found = [
        f"{name} is {value}; it must be at least {least}"
        for name, value, least in (
            ("n_layer", n_layer, 1),
            ("n_embd", n_embd, 2),
            ("vocab_size", vocab_size, 1),
            ("head_size", head_size, 2),
            ("dim_ffn", dim_ffn, 1),
        )
        if value < least
    ]
    if n_embd % max(head_size, 1):
        found.append(f"n_embd {n_embd} is not divisible by head_size {head_size}; change one of them")
    widths = _low_rank(version, max(n_embd, 1))
    if version == 7 and n_layer == 1:
        del widths["v"]  # layer 0 mixes no v_first
    for name, width in (low_rank or {}).items():
        if name not in widths:
            found.append(f"low_rank has {name!r}; RWKV-{version} of {n_layer} layers has {', '.join(widths)}")
        elif width < 1:
            found.append(f"low_rank.{name} is {width}; it must be at least 1")
    if found:
        raise UserError("; ".join(found))
    return ModelConfig(
        version, n_layer, n_embd, n_embd // head_size, head_size, dim_ffn, vocab_size, widths | (low_rank or {})
    )


def _low_rank(version: int, n_embd: int) -> dict[str, int]:
    """RWKV-7: a multiple of 32 near 2.5, 2.5, 1.7 or 5 times sqrt(n_embd), as in x070. RWKV-6: the constants of
    x060, doubled from 4096 on, as the published World models of that size (7B, 14B) have them."""
    if version == 6:
        factor = 2 if n_embd >= 4096 else 1
        return {"maa": 32 * factor, "decay": 64 * factor}
    return {
        name: max(32, round(scale * n_embd**0.5 / 32) * 32)
        for name, scale in (("w", 2.5), ("a", 2.5), ("v", 1.7), ("g", 5))
    }


def init_weights(config: ModelConfig, seed: int) -> dict[str, Tensor]:
    """The weights of an untrained model, fp32, with the keys and shapes of a checkpoint. (Of RWKV-7 without the first
    layer's v0, v1 and v2, which BlinkDL's files have and nothing uses.)

    Args:
        config: `low_rank` needs every width of the version (v of RWKV-7 only with more than one layer).
        seed: of the random matrices; the same seed gives the same weights.
    """
    return dict(_weights(config, seed))


def write_initial(config: ModelConfig, seed: int, out: str | os.PathLike, dtype: str | torch.dtype) -> int:
    """Writes `init_weights` as a .pth in `dtype`, holding one tensor at a time; returns the number of parameters.

    Raises:
        UserError: `out` exists, does not end in .pth, or cannot be written.
    """
    out, dtype = Path(out), parse_dtype(dtype)
    if out.suffix != ".pth":
        raise UserError(f"{out}: the model is written as .pth; give a name that ends so")
    if out.exists():
        raise UserError(f"{out}: exists already; give another name, or remove it first")
    specs = {name: TensorSpec(shape, dtype) for name, shape in _shapes(config).items()}
    weights = _weights(config, seed)
    with atomic_write(out) as part:
        write_pth(part, specs, lambda _: next(weights)[1].to(dtype))
    return sum(spec.shape.numel() for spec in specs.values())


def _shapes(config: ModelConfig) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {name: p.shape for name, p in MODELS[config.version](config).named_parameters()}


def _weights(config: ModelConfig, seed: int) -> Iterator[tuple[str, Tensor]]:
    rng = torch.Generator().manual_seed(seed)
    for name, shape in _shapes(config).items():
        yield name, _initial(name, shape, config, rng)


def _initial(name: str, shape: torch.Size, config: ModelConfig, rng: torch.Generator) -> Tensor:
    if name == "emb.weight":
        return torch.empty(shape).uniform_(-1e-4, 1e-4, generator=rng)
    if name == "head.weight":
        return _orthogonal(shape, 0.5 * math.sqrt(max(config.vocab_size / config.n_embd, 1)), rng)
    if re.search(r"\bln(0|1|2|_out)\.", name):
        return torch.ones(shape) if name.endswith(".weight") else torch.zeros(shape)
    _, layer, part = name.split(".", 2)
    early = 1 - int(layer) / config.n_layer
    if part in _GAIN:
        return _orthogonal(shape, _GAIN[part], rng)
    if part.startswith("ffn."):
        return _shift(shape, early**4 if config.version == 7 else early)
    part = part.removeprefix("att.")
    if part in _SHIFT_POWER:
        return _shift(shape, _SHIFT_POWER[part] * early)
    if part == "ln_x.weight":
        return torch.full(shape, ((1 + int(layer)) / config.n_layer) ** 0.7)
    if part == "ln_x.bias":
        return torch.zeros(shape)
    late = int(layer) / max(config.n_layer - 1, 1)
    channel = torch.arange(config.n_embd) / (config.n_embd - 1)
    if config.version == 6:
        return _time_mix_6(part, shape, early, late, channel, rng)
    return _time_mix_7(part, shape, late, channel, config.head_size, rng)


def _time_mix_7(
    part: str, shape: torch.Size, late: float, channel: Tensor, head_size: int, rng: torch.Generator
) -> Tensor:
    in_head = (torch.arange(len(channel)) % head_size) / (head_size - 1) * 2 - 1
    zigzag = in_head * in_head.abs()
    if part == "w0":
        # z of the decay exp(-e^-0.5 sigmoid(z)), from -8 (0.9998) to 3 (0.56); the deeper, the fewer fast channels.
        return (-5.5 + 6 * channel.pow(1 + late**0.3) + 2.5 * zigzag).view(shape)
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
    if part in ("w1", "a1", "v1", "g1"):
        return torch.zeros(shape)
    assert part in ("w2", "a2", "v2", "g2"), part
    return _orthogonal(shape, 0.1 * math.sqrt(max(shape[0] / shape[1], 1)), rng)


def _time_mix_6(
    part: str, shape: torch.Size, early: float, late: float, channel: Tensor, rng: torch.Generator
) -> Tensor:
    if part == "time_maa_v":
        return _shift(shape, early) - 0.3 * late
    if part == "time_decay":
        # w of the decay exp(-exp(w)), from -6 (0.998) to -1 (0.69); the deeper, the fewer fast channels.
        return (-6 + 5 * channel.pow(0.7 + 1.3 * late)).view(shape)
    if part == "time_faaaa":
        zigzag = (torch.arange(len(channel)) + 1) % 3 - 1
        return (late * (1 - channel) + 0.1 * zigzag).view(shape)
    if part in ("time_maa_w1", "time_decay_w1"):
        return torch.zeros(shape)
    assert part in ("time_maa_w2", "time_decay_w2"), part
    return torch.empty(shape).uniform_(-0.01, 0.01, generator=rng)


def _shift(shape: torch.Size, power: float) -> Tensor:
    return 1 - (torch.arange(shape.numel()) / shape.numel()).pow(power).view(shape)


def _orthogonal(shape: torch.Size, gain: float, rng: torch.Generator) -> Tensor:
    return nn.init.orthogonal_(torch.empty(shape), gain=gain, generator=rng)
