"""A learned state that sequences begin from instead of zeros: a parameter `att.time_state` (H, N, N) of each layer.

In files, alone or beside a model's weights, it is `blocks.{i}.att.time_state` (H, N_value, N_key) in every version. The
`rwkv` package transposes RWKV-6's into its own state, (key, value), and takes RWKV-7's, (value, key), as it is;
RWKV-PEFT trains both in the files' layout. In memory it has the layout of the version's recurrence (`RWKV.key_first`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from rwkv_miss.checkpoint import read_checkpoint
from rwkv_miss.config import ModelConfig
from rwkv_miss.errors import UserError
from rwkv_miss.files import check_is_file
from rwkv_miss.model.base import RWKV

_NAME = "att.time_state"


def is_state(key: str) -> bool:
    """Whether a checkpoint's key is that of a layer's learned state."""
    return key.endswith("." + _NAME)


def state_shapes(config: ModelConfig) -> dict[str, torch.Size]:
    """The keys of a learned state, and their shape, which is the same in memory and in files."""
    shape = torch.Size((config.n_head, config.head_size, config.head_size))
    return {f"blocks.{i}.{_NAME}": shape for i in range(config.n_layer)}


def file_layout(state: Tensor, kind: type[RWKV]) -> Tensor:
    """A layer's state (H, N, N) from the layout in memory to that of files, or back: for each version the two are the
    same or each other's transpose."""
    return state.transpose(1, 2).contiguous() if kind.key_first else state


def has_initial_state(model: RWKV) -> bool:
    return model.time_mixes()[0].time_state is not None


def add_initial_state(model: RWKV) -> None:
    """Adds a learned state of zeros to a model that has none, in place: its results stay the same. The state is fp32
    (float64 in a float64 model)."""
    like = model.emb.weight
    wide = torch.promote_types(like.dtype, torch.float32)
    for time_mix, shape in zip(model.time_mixes(), state_shapes(model.config).values(), strict=True):
        time_mix.time_state = nn.Parameter(torch.zeros(shape, dtype=wide, device=like.device))


def load_initial_state(model: RWKV, path: str | os.PathLike) -> None:
    """Adds the learned state in a .pth or .st file to a model that has none, in place.

    Raises:
        UserError: the model has one already, or the file does not hold a state for a model of this size.
    """
    if has_initial_state(model):
        raise UserError(f"{path}: the model has a learned initial state already (its own, or its adapter's)")
    check_is_file(Path(path), "state")
    found = read_checkpoint(path)
    check_states(found, model.config, path)
    add_initial_state(model)
    for key, tensor in found.items():
        model.get_parameter(key).data.copy_(file_layout(tensor, type(model)))


def check_states(found: Mapping[str, Tensor], config: ModelConfig, path: str | os.PathLike) -> None:
    """UserError unless `found`, from a state file, is a state for a model of `config`."""
    wanted = state_shapes(config)
    if unknown := [key for key in found if key not in wanted]:
        raise UserError(
            f"{path}: {unknown[0]} is not a part of the state of an RWKV-{config.version} of {config.n_layer} layers; "
            f"expected blocks.0.{_NAME} to blocks.{config.n_layer - 1}.{_NAME} alone"
        )
    for key, shape in wanted.items():
        if key not in found:
            raise UserError(f"{path}: {key} is missing; the model has {config.n_layer} layers")
        if found[key].shape != shape:
            raise UserError(f"{path}: {key} has shape {tuple(found[key].shape)}, expected {tuple(shape)}")
        if not torch.isfinite(found[key]).all():
            raise UserError(f"{path}: {key} has values that are not finite")
