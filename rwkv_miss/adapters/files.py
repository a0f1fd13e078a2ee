"""Adapters on disk, in HF PEFT's format: `adapter_config.json` and `adapter_model.safetensors`. What PEFT has no
field for (which base, tokenizer, template) is in `rwkv_miss.json` beside them."""

from __future__ import annotations

import json
import os
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

import rwkv_miss
from rwkv_miss.adapters.inject import adapters, inject_linears
from rwkv_miss.checkpoint import atomic_write, write_safetensors
from rwkv_miss.config import AdapterConfig
from rwkv_miss.errors import UserError

CONFIG, WEIGHTS, OURS = "adapter_config.json", "adapter_model.safetensors", "rwkv_miss.json"
_PREFIX, _SUFFIX = "base_model.model.", ".miss_block"


@dataclass(frozen=True)
class AdapterFile:
    """An adapter folder, read: D by module path, each (r, out)."""

    config: AdapterConfig
    blocks: dict[str, Tensor]
    base_fingerprint: str | None
    """None: the adapter was made by a program that does not record its base."""


def save_adapter(model: nn.Module, folder: str | os.PathLike, extra: dict[str, Any] | None = None) -> None:
    """Writes the model's adapter to a folder, each file beside the old one and renamed.

    Args:
        extra: further facts for `rwkv_miss.json`, such as the tokenizer.
    """
    found = adapters(model)
    if not found:
        raise UserError("the model has no adapter to save; call inject first")
    config: AdapterConfig = model.adapter_config
    peft = {
        "peft_type": "MISS",
        "task_type": None,
        "base_model_name_or_path": None,
        "r": config.r,
        "mini_r": 1,
        "miss_dropout": config.dropout,
        "init_weights": True,
        "bias": "none",
        "target_modules": config.target_modules or list(model.linears),
        "modules_to_save": None,
        "inference_mode": True,
    }
    ours = {"rwkv_miss": rwkv_miss.__version__, "base_fingerprint": model.fingerprint, **(extra or {})}
    tensors = {f"{_PREFIX}{name}{_SUFFIX}": m.miss_block.detach().contiguous().cpu() for name, m in found.items()}
    folder = Path(folder)
    # All three are written before the first is renamed: on a full disk the old adapter stays as it was.
    with ExitStack() as renames:
        for name, content in ((OURS, ours), (CONFIG, peft)):
            part = renames.enter_context(atomic_write(folder / name))
            part.write_text(json.dumps(content, indent=2) + "\n")
        part = renames.enter_context(atomic_write(folder / WEIGHTS))
        write_safetensors(part, tensors, {"format": "pt"})


def read_adapter(folder: str | os.PathLike) -> AdapterFile:
    """Reads an adapter folder, ours or HF PEFT's.

    Raises:
        UserError: no such folder, a damaged file, another method or variant, or keys that are no MiSS adapter.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected an adapter folder with {CONFIG} and {WEIGHTS}")
    peft = _read_json(folder / CONFIG)
    if peft.get("peft_type") != "MISS":
        raise UserError(f"{folder / CONFIG}: peft_type is {peft.get('peft_type')!r}; only MISS adapters can be read")
    if type(peft.get("r")) is not int:
        raise UserError(f"{folder / CONFIG}: r is {peft.get('r')!r}; expected a whole number")
    if not isinstance(peft.get("init_weights", True), bool):
        raise UserError(
            f"{folder / CONFIG}: init_weights is {peft['init_weights']!r}, a variant of MiSS; only the standard form "
            "can be read"
        )
    if not (folder / WEIGHTS).is_file():
        raise UserError(f"{folder / WEIGHTS}: no such file; the adapter folder is incomplete")
    try:
        tensors = load_file(folder / WEIGHTS)
    except SafetensorError as e:
        raise UserError(f"{folder / WEIGHTS}: not a readable safetensors file ({e}); is it truncated?") from None
    blocks = {}
    for key, tensor in tensors.items():
        if not (key.startswith(_PREFIX) and key.endswith(_SUFFIX)):
            raise UserError(f"{folder / WEIGHTS}: key {key} is not a part of a MiSS adapter")
        if tensor.ndim != 2 or tensor.shape[0] != peft.get("r"):
            raise UserError(
                f"{folder / WEIGHTS}: {key} has shape {tuple(tensor.shape)}; expected ({peft.get('r')}, out) as "
                f"{CONFIG} says r = {peft.get('r')}"
            )
        blocks[key[len(_PREFIX) : -len(_SUFFIX)]] = tensor
    targets = peft.get("target_modules")
    config = AdapterConfig(
        r=peft["r"],
        dropout=peft.get("miss_dropout", 0.0),
        target_modules=sorted(targets) if isinstance(targets, list) else sorted(blocks),
    )
    return AdapterFile(config, blocks, read_facts(folder).get("base_fingerprint"))


def read_facts(folder: str | os.PathLike) -> dict[str, Any]:
    """What we recorded of an adapter beside PEFT's files: its base, tokenizer, ...; nothing of PEFT's own adapters."""
    path = Path(folder) / OURS
    return _read_json(path) if path.is_file() else {}


def check_fits(adapter: AdapterFile, shapes: dict[str, torch.Size], base_mark: str, folder: str | os.PathLike) -> None:
    """UserError unless the adapter was made for this base and has a block for each of its targets and no other.

    Args:
        shapes: (out, in) of the base's linears that may be adapted, by module path.
        base_mark: the base's fingerprint.
    """
    if adapter.base_fingerprint not in (None, base_mark):
        raise UserError(
            f"{folder}: the adapter was trained on another base (fingerprint {adapter.base_fingerprint[:12]}; this one "
            f"has {base_mark[:12]}); give the base it was trained on"
        )
    if unused := [name for name in adapter.blocks if name not in shapes]:
        raise UserError(f"{folder}: the adapter has {unused[0]}, which is no linear of this base; nothing would use it")
    targets = adapter.config.target_modules or []
    wanted = [n for n in shapes if any(n == t or n.endswith("." + t) for t in targets)]
    if missing := [n for n in wanted if n not in adapter.blocks]:
        raise UserError(f"{folder}: {CONFIG} names {missing[0]} as a target but {WEIGHTS} has no block for it")
    for name, block in adapter.blocks.items():
        out, n_in = shapes[name]
        if block.shape[1] != out or block.shape[0] > n_in:
            raise UserError(
                f"{folder}: the block of {name} has shape {tuple(block.shape)}; the linear is {n_in} -> {out}, so "
                f"expected (r, {out}) with r <= {n_in}"
            )
        if not torch.isfinite(block).all():
            raise UserError(f"{folder}: the block of {name} has values that are not finite; the run had diverged")


def load_adapter(model: nn.Module, folder: str | os.PathLike) -> nn.Module:
    """Injects the adapter of a folder into a model that has none, in place.

    Raises:
        UserError: as `read_adapter` and `check_fits`; or the model has an adapter already.
    """
    if adapters(model):
        raise UserError("the model has an adapter already; load the base again for another")
    adapter = read_adapter(folder)
    shapes = {n: m.weight.shape for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "head"}
    check_fits(adapter, shapes, model.fingerprint, folder)
    inject_linears(model, {name: block.shape[0] for name, block in adapter.blocks.items()}, adapter.config.dropout)
    for name, linear in adapters(model).items():
        linear.miss_block.data.copy_(adapter.blocks[name])
    model.adapter_config = adapter.config
    return model


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path}: no such file; the adapter folder is incomplete")
    try:
        content = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise UserError(f"{path}: not JSON ({e})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}; expected an object")
    return content
