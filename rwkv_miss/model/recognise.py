"""Which model a checkpoint holds, by its keys and shapes alone."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from rwkv_miss.config import ModelConfig
from rwkv_miss.errors import UserError
from rwkv_miss.model.base import RWKV
from rwkv_miss.model.initial_state import is_state, state_shapes
from rwkv_miss.model.versions import MODELS


def infer_config(tensors: Mapping[str, Tensor], path: str | os.PathLike) -> ModelConfig:
    """The sizes of the model in a checkpoint (keys: BlinkDL's RWKV-LM), after a check that all tensors fit them.

    Args:
        path: the file that the tensors are from, for messages.

    Raises:
        UserError: the architecture or layout is another (the message names it and says what to do); or a key is
            missing, is not a part of the model, or has a shape that contradicts the others.
    """
    kind = _recognise(tensors, path)

    def shape(key: str) -> torch.Size:
        if key not in tensors:
            raise UserError(f"{path}: RWKV-{kind.version} checkpoint without {key}; the file is incomplete")
        if tensors[key].ndim != 2:
            raise UserError(f"{path}: {key} has shape {tuple(tensors[key].shape)}, expected two dimensions")
        return tensors[key].shape

    layers = {m.group(1) for key in tensors if (m := re.match(r"blocks\.(\d+)\.", key))}
    # As text: a key may hold any number of digits, and any script's.
    if missing := [i for i in range(len(layers)) if str(i) not in layers]:
        last = max(layers, key=lambda number: (len(number), number))
        raise UserError(f"{path}: blocks.{missing[0]}.* is missing, although there is blocks.{last}.*")
    found = kind.find_sizes(shape, tensors.keys(), len(layers))
    vocab_size, n_embd = shape("emb.weight")
    if found.n_head * found.head_size != n_embd:
        raise UserError(
            f"{path}: {found.n_head} heads of {found.head_size} ({found.heads_key}) do not make up n_embd {n_embd}"
        )
    config = ModelConfig(
        version=kind.version,
        n_layer=len(layers),
        n_embd=n_embd,
        n_head=found.n_head,
        head_size=found.head_size,
        dim_ffn=shape("blocks.0.ffn.key.weight")[0],
        vocab_size=vocab_size,
        low_rank=found.low_rank,
    )
    _check_shapes(kind, config, {key: t.shape for key, t in tensors.items()}, path)
    return config


def parameter_shapes(config: ModelConfig) -> dict[str, torch.Size]:
    """The keys of the model's own parameters and their shapes, in the model's order, without a learned state."""
    with torch.device("meta"):
        return {name: p.shape for name, p in MODELS[config.version](config).named_parameters()}


def _recognise(tensors: Mapping[str, Tensor], path: str | os.PathLike) -> type[RWKV]:
    def refuse(what: str, way_out: str) -> UserError:
        return UserError(f"{path}: {what}; {way_out}")

    names = set(tensors)
    if any(name.startswith(("model.layers.", "model.embeddings.", "rwkv.", "model.blocks.")) for name in names):
        raise refuse(
            "a Hugging Face layout (keys such as " + next(n for n in names if n.startswith(("model.", "rwkv."))) + ")",
            "use the .pth it was converted from, in BlinkDL's layout (emb.weight, blocks.0.att...)",
        )
    if any(name.endswith((".disha", ".bone", ".miss_block")) for name in names) or any("lora_A" in n for n in names):
        raise refuse("an adapter, not a model", "give the base checkpoint here")
    if names and all(map(is_state, names)):
        raise refuse("a learned initial state, not a model", "give the base here, and this file as --state to generate")
    if not any(name.startswith("blocks.0.att.") for name in names):
        found = ", ".join(sorted(names)[:3])
        raise refuse(f"not an RWKV checkpoint (keys such as {found})", "expected blocks.0.att.* and emb.weight")
    for kind in MODELS.values():
        if kind.recognises(names):
            return kind
    if any(".ffn.s_emb" in name for name in names):
        raise refuse("an RWKV-7a/7b (DeepEmbed) checkpoint", "only plain RWKV-7 is supported")
    old = 5 if "blocks.0.att.ln_x.weight" in names else 4
    raise refuse(f"an RWKV-{old} checkpoint", "RWKV-6 and RWKV-7 are supported; fine-tune from a newer base")


def _check_shapes(
    kind: type[RWKV], config: ModelConfig, found: Mapping[str, torch.Size], path: str | os.PathLike
) -> None:
    wanted = parameter_shapes(config)
    if any(map(is_state, found)):
        wanted |= state_shapes(config)
    found = {key: shape for key, shape in found.items() if key not in kind.unused}
    problems = [f"{key} is missing" for key in wanted if key not in found]
    unknown = [key for key in found if key not in wanted]
    problems += [f"{key} is not a part of RWKV-{config.version}" for key in unknown]
    problems += [
        f"{key} has shape {tuple(found[key])}, expected {tuple(shape)}"
        for key, shape in wanted.items()
        if key in found and shape != found[key]
    ]
    if problems:
        more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
        hint = "; if it is of a variant or a later version, that is not supported" if unknown else ""
        raise UserError(f"{path}: the checkpoint does not fit together: {'; '.join(problems[:5])}{more}{hint}")
