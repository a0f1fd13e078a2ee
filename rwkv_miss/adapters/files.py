"""Adapters on disk: `adapter_config.json` and `adapter_model.safetensors`, in HF PEFT's format where PEFT has a form
for what was trained: MiSS, and whole modules beside it (its modules_to_save). Anything else, such as a state or a
parameter of a time mix, makes the folder one of our own type, which PEFT refuses instead of loading a part of it. What
PEFT has no field for (which base, tokenizer, template) is in `rwkv_miss.json` beside them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

import rwkv_miss
from rwkv_miss.adapters.full import checkpoint_key, matches, whole_parameters
from rwkv_miss.adapters.inject import adapters, install, refuse_second
from rwkv_miss.checkpoint import write_safetensors
from rwkv_miss.config import METHODS, AdapterConfig, ModelConfig
from rwkv_miss.errors import UserError
from rwkv_miss.files import atomic_write
from rwkv_miss.model import MODELS
from rwkv_miss.model.initial_state import is_state, state_shapes

CONFIG, WEIGHTS, OURS = "adapter_config.json", "adapter_model.safetensors", "rwkv_miss.json"
_PREFIX, _SUFFIX = "base_model.model.", ".miss_block"
_PEFT_TYPE, _OUR_TYPE = "MISS", "RWKV_MISS"


@dataclass(frozen=True)
class AdapterFile:
    """An adapter folder, read."""

    config: AdapterConfig
    blocks: dict[str, Tensor]
    """D of each adapted linear by the path of its module, each (r, out)."""
    tensors: dict[str, Tensor]
    """What was trained itself, by its key in a checkpoint: parameters of the base, and the layers' learned states, in
    the layout of the model's own state."""
    base_fingerprint: str | None
    """None: the adapter was made by a program that does not record its base."""


def save_adapter(model: nn.Module, folder: str | os.PathLike, extra: dict[str, Any] | None = None) -> None:
    """Writes what was trained of the model to a folder, each file beside the old one and renamed.

    Args:
        extra: further facts for `rwkv_miss.json`, such as the tokenizer.
    """
    if not hasattr(model, "adapter_config"):
        raise UserError("the model has no adapter to save; call inject first")
    config: AdapterConfig = model.adapter_config
    blocks = {f"{name}{_SUFFIX}": m.miss_block for name, m in adapters(model).items()}
    whole = whole_parameters(model)
    modules = _modules(model, whole)
    peft = {
        "peft_type": _PEFT_TYPE if blocks and modules is not None else _OUR_TYPE,
        "task_type": None,
        "base_model_name_or_path": None,
        "r": config.r,
        "mini_r": 1,
        "miss_dropout": config.dropout,
        "init_weights": True,
        "bias": "none",
        "target_modules": (config.target_modules or list(model.linears)) if blocks else None,
        "modules_to_save": modules or config.modules_to_save,
        "inference_mode": True,
    }
    if peft["peft_type"] == _OUR_TYPE:
        peft["method"] = config.method
    ours = {"rwkv_miss": rwkv_miss.__version__, "base_fingerprint": model.fingerprint, **(extra or {})}
    tensors = {f"{_PREFIX}{name}": p.detach().contiguous().cpu() for name, p in (blocks | whole).items()}
    folder = Path(folder)
    # All three are written before the first is renamed: on a full disk the old adapter stays as it was.
    with ExitStack() as renames:
        for name, content in ((OURS, ours), (CONFIG, peft)):
            part = renames.enter_context(atomic_write(folder / name))
            part.write_text(json.dumps(content, indent=2) + "\n")
        part = renames.enter_context(atomic_write(folder / WEIGHTS))
        write_safetensors(part, tensors, {"format": "pt"})


def _modules(model: nn.Module, whole: Mapping[str, nn.Parameter]) -> list[str] | None:
    """The ends of the names of the modules whose parameters `whole` are; None where it is no set of whole modules of
    PyTorch's, such as PEFT can replace by a copy."""
    paths = {key.rpartition(".")[0] for key in whole}
    for module in map(model.get_submodule, paths):
        is_plain = isinstance(module, (nn.LayerNorm, nn.GroupNorm, nn.Embedding, nn.Linear))
        if not is_plain or not all(p.requires_grad for p in module.parameters()):
            return None
    ends = {re.sub(r"^blocks\.\d+\.", "", path) for path in paths}  # ln1 for blocks.0.ln1, blocks.1.ln1, ...
    meant = {
        key for key in map(checkpoint_key, dict(model.named_parameters())) if any(matches(key, end) for end in ends)
    }
    return sorted(ends if meant == set(whole) else paths)


def read_adapter(folder: str | os.PathLike) -> AdapterFile:
    """Reads an adapter folder, ours or HF PEFT's.

    Raises:
        UserError: no such folder, a damaged file, another method or variant, or keys that are no adapter's.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected an adapter folder with {CONFIG} and {WEIGHTS}")
    peft = _read_json(folder / CONFIG)
    if peft.get("peft_type") not in (_PEFT_TYPE, _OUR_TYPE):
        raise UserError(f"{folder / CONFIG}: peft_type is {peft.get('peft_type')!r}; only MISS adapters can be read")
    method = "miss" if peft["peft_type"] == _PEFT_TYPE else peft.get("method")
    if method not in METHODS:
        raise UserError(f"{folder / CONFIG}: method is {method!r}; this version has: {', '.join(METHODS)}")
    if type(peft.get("r")) is not int:
        raise UserError(f"{folder / CONFIG}: r is {peft.get('r')!r}; expected a whole number")
    dropout = peft.get("miss_dropout", 0.0)
    if type(dropout) not in (int, float) or not 0 <= dropout < 1:
        raise UserError(f"{folder / CONFIG}: miss_dropout is {dropout!r}; expected a number in [0, 1)")
    targets, modules = peft.get("target_modules"), peft.get("modules_to_save")
    for name, value in (("target_modules", targets), ("modules_to_save", modules)):
        if isinstance(value, list) and not all(isinstance(item, str) for item in value):
            raise UserError(f"{folder / CONFIG}: {name} is {value}; expected names")
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
    blocks, whole = {}, {}
    for key, tensor in tensors.items():
        name = key.removeprefix(_PREFIX)
        if name == key:
            raise UserError(f"{folder / WEIGHTS}: key {key} is not a part of an adapter; expected {_PREFIX}...")
        if not name.endswith(_SUFFIX):
            whole[name] = tensor
            continue
        if tensor.ndim != 2 or tensor.shape[0] != peft.get("r"):
            raise UserError(
                f"{folder / WEIGHTS}: {key} has shape {tuple(tensor.shape)}; expected ({peft.get('r')}, out) as "
                f"{CONFIG} says r = {peft.get('r')}"
            )
        blocks[name.removesuffix(_SUFFIX)] = tensor
    # PEFT's further ways to choose: a pattern, and what to leave out of a list. The blocks say what they came to.
    is_limited = any(peft.get(name) is not None for name in ("layers_to_transform", "exclude_modules"))
    config = AdapterConfig(
        method=method,
        r=peft["r"],
        dropout=dropout,
        target_modules=sorted(targets) if isinstance(targets, list) and not is_limited else sorted(blocks) or None,
        modules_to_save=sorted(modules) if isinstance(modules, list) and modules else None,
    )
    return AdapterFile(config, blocks, whole, read_facts(folder).get("base_fingerprint"))


def read_facts(folder: str | os.PathLike) -> dict[str, Any]:
    """What we recorded of an adapter beside PEFT's files: its base, tokenizer, ...; nothing of PEFT's own adapters."""
    path = Path(folder) / OURS
    return _read_json(path) if path.is_file() else {}


def check_fits(
    adapter: AdapterFile,
    config: ModelConfig,
    shapes: Mapping[str, torch.Size],
    base_mark: str,
    folder: str | os.PathLike,
) -> None:
    """UserError unless the adapter was made for this base, has all that its config says was trained, and nothing that
    the base has no place for.

    Args:
        shapes: of the base's tensors by their keys.
        base_mark: the base's fingerprint.
    """
    if adapter.base_fingerprint not in (None, base_mark):
        raise UserError(
            f"{folder}: the adapter was trained on another base (fingerprint {adapter.base_fingerprint[:12]}; this one "
            f"has {base_mark[:12]}); give the base it was trained on"
        )
    _check_blocks(adapter, config, shapes, folder)
    kind, file = MODELS[config.version], Path(folder) / WEIGHTS
    shapes = {key: shape for key, shape in shapes.items() if key not in kind.unused}
    states = state_shapes(config)
    known = shapes | states
    for key, tensor in adapter.tensors.items():
        if key not in known or key.removesuffix(".weight") in adapter.blocks:
            why = "is no part of this base" if key not in known else "is there beside a MiSS block of the same linear"
            raise UserError(f"{file}: the adapter has {_PREFIX}{key}, which {why}; nothing would use it")
        if tensor.shape != known[key]:
            raise UserError(f"{file}: {key} has shape {tuple(tensor.shape)}, expected {tuple(known[key])}")
        if not torch.isfinite(tensor).all():
            raise UserError(f"{file}: {key} has values that are not finite; the run had diverged")
    modules, method = adapter.config.modules_to_save or [], adapter.config.method
    wanted = [key for key in shapes if method == "full" or any(matches(key, name) for name in modules)]
    if "state" in method or any(map(is_state, adapter.tensors)):
        wanted += states
    if missing := [key for key in wanted if key not in adapter.tensors]:
        raise UserError(f"{folder}: {CONFIG} says that {missing[0]} was trained but {WEIGHTS} does not have it")


def _check_blocks(
    adapter: AdapterFile, config: ModelConfig, shapes: Mapping[str, torch.Size], folder: str | os.PathLike
) -> None:
    linears = {
        key.removesuffix(".weight"): shape
        for key, shape in shapes.items()
        if any(key.endswith(f".{name}.weight") for name in MODELS[config.version].linears)
    }
    if unused := [name for name in adapter.blocks if name not in linears]:
        raise UserError(f"{folder}: the adapter has {unused[0]}, which is no linear of this base; nothing would use it")
    targets = adapter.config.target_modules or []
    wanted = [n for n in linears if any(n == t or n.endswith("." + t) for t in targets)]
    if missing := [n for n in wanted if n not in adapter.blocks]:
        raise UserError(f"{folder}: {CONFIG} names {missing[0]} as a target but {WEIGHTS} has no block for it")
    for name, block in adapter.blocks.items():
        out, n_in = linears[name]
        if block.shape[1] != out or block.shape[0] > n_in:
            raise UserError(
                f"{folder}: the block of {name} has shape {tuple(block.shape)}; the linear is {n_in} -> {out}, so "
                f"expected (r, {out}) with r <= {n_in}"
            )
        if not torch.isfinite(block).all():
            raise UserError(f"{folder}: the block of {name} has values that are not finite; the run had diverged")


def load_adapter(model: nn.Module, folder: str | os.PathLike) -> nn.Module:
    """Adds what a folder holds to a model that has no adapter, in place, as `inject` does.

    Raises:
        UserError: as `read_adapter` and `check_fits`; or the model has an adapter already.
    """
    refuse_second(model)
    adapter = read_adapter(folder)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    check_fits(adapter, model.config, shapes, model.fingerprint, folder)
    ranks = {name: block.shape[0] for name, block in adapter.blocks.items()}
    install(model, ranks, adapter.config.dropout, list(adapter.tensors))
    trained = {name: m.miss_block for name, m in adapters(model).items()} | whole_parameters(model)
    for name, tensor in (adapter.blocks | adapter.tensors).items():
        trained[name].data.copy_(tensor)
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
