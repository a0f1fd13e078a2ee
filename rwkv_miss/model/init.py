"""The initial weights of a new model, to be trained from scratch.

Every value follows BlinkDL's RWKV-LM: RWKV-v7/train_temp/src/model.py for RWKV-7 (x070), RWKV-v5/src/model.py for
RWKV-6 (x060): the constructors of the time mix and the channel mix, and `generate_init_weight`, which then overwrites
the matrices. Every version: emb.weight uniform in +-1e-4; norms have weight 1 and bias 0, but ln_x.weight is
((1 + layer) / n_layer) ** 0.7; head.weight orthogonal. The rest is in each version's own file (`RWKV.initial`).
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from rwkv_miss.checkpoint import TensorSpec, parse_dtype, write_pth
from rwkv_miss.config import ModelConfig
from rwkv_miss.errors import UserError
from rwkv_miss.files import atomic_write, check_name
from rwkv_miss.model.initial_values import orthogonal
from rwkv_miss.model.recognise import parameter_shapes
from rwkv_miss.model.versions import MODELS


def new_config(
    version: int | str,
    n_layer: int,
    n_embd: int,
    vocab_size: int,
    head_size: int = 64,
    dim_ffn: int | None = None,
    low_rank: dict[str, int] | None = None,
) -> ModelConfig:
    """The sizes of a model to be made; those that are not given are chosen as BlinkDL's training code chooses them
    (`RWKV.default_sizes`).

    Args:
        low_rank: widths that replace the default ones, by their names in `ModelConfig.low_rank`.

    Raises:
        UserError: there is no such version, or no model can have these sizes; the message lists all that are wrong.
    """
    if version not in MODELS:
        raise UserError(f"version is {version}; there are {', '.join(map(str, MODELS))}")
    default_dim_ffn, widths = MODELS[version].default_sizes(max(n_embd, 1))
    dim_ffn = default_dim_ffn if dim_ffn is None else dim_ffn
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
    for name, width in (low_rank or {}).items():
        if name not in widths:
            found.append(f"low_rank has {name!r}; RWKV-{version} has {', '.join(widths)}")
        elif width < 1:
            found.append(f"low_rank.{name} is {width}; it must be at least 1")
    if found:
        raise UserError("; ".join(found))
    return ModelConfig(
        version, n_layer, n_embd, n_embd // head_size, head_size, dim_ffn, vocab_size, widths | (low_rank or {})
    )


def init_weights(config: ModelConfig, seed: int) -> dict[str, Tensor]:
    """The weights of an untrained model, fp32, with the keys and shapes of its parameters.

    Args:
        config: its `low_rank` must have every width of the version.
        seed: Seed of the random matrices; the same seed gives the same weights.
    """
    return dict(_weights(parameter_shapes(config), config, seed))


def write_initial(config: ModelConfig, seed: int, out: str | os.PathLike, dtype: str | torch.dtype) -> int:
    """Writes `init_weights` as a .pth in `dtype`, holding one tensor at a time, and after them the tensors that the
    model does not use but other programs ask for (`RWKV.unused_shapes`). Returns the number of parameters.

    Raises:
        UserError: `out` exists, does not end in .pth, or cannot be written; the seed is not from 0 to 2^64 - 1.
    """
    out, dtype = Path(out), parse_dtype(dtype)
    if not 0 <= seed < 2**64:
        raise UserError(f"seed is {seed}; it must be at least 0 and below 2**64")
    if out.suffix != ".pth":
        raise UserError(f"{out}: the model is written as .pth; give a name that ends so")
    check_name(out, "a model")
    if out.exists():
        raise UserError(f"{out}: exists already; give another name, or remove it first")
    shapes = parameter_shapes(config) | MODELS[config.version].unused_shapes(config)
    weights = _weights(shapes, config, seed)
    with atomic_write(out) as part:
        specs = {name: TensorSpec(shape, dtype) for name, shape in shapes.items()}
        write_pth(part, specs, lambda _: next(weights)[1].to(dtype))
    return sum(shape.numel() for shape in shapes.values())


def _weights(shapes: dict[str, torch.Size], config: ModelConfig, seed: int) -> Iterator[tuple[str, Tensor]]:
    rng = torch.Generator().manual_seed(seed)
    for name, shape in shapes.items():
        yield name, _initial(name, shape, config, rng)


def _initial(name: str, shape: torch.Size, config: ModelConfig, rng: torch.Generator) -> Tensor:
    if name == "emb.weight":
        return torch.empty(shape).uniform_(-1e-4, 1e-4, generator=rng)
    if name == "head.weight":
        return orthogonal(shape, 0.5 * math.sqrt(max(config.vocab_size / config.n_embd, 1)), rng)
    if name.startswith("blocks."):
        _, layer, part = name.split(".", 2)
        own = MODELS[config.version].initial(part, shape, int(layer), config, rng)
        if own is not None:
            return own
        if part == "att.ln_x.weight":
            return torch.full(shape, ((1 + int(layer)) / config.n_layer) ** 0.7)
    assert re.search(r"\bln(0|1|2|_x|_out)\.", name), f"{name} has no initial value"
    return torch.ones(shape) if name.endswith(".weight") else torch.zeros(shape)
