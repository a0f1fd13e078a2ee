"""Adapters on disk: `adapter_config.json` and `adapter_model.safetensors`, in HF PEFT's format if it can hold what was
trained: a method beside linears, and whole modules besides (PEFT's modules_to_save). With anything else, such as a
state or a parameter of a time mix, the folder has a peft_type of our own, so that PEFT refuses it instead of loading a
part of it. What PEFT has no field for (which base, tokenizer, template) is in `rwkv_miss.json` beside them."""

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
from torch import Tensor, nn

import rwkv_miss
from rwkv_miss.adapters.inject import base_shapes, checkpoint_key, install, installed, refuse_second, trained_parameters
from rwkv_miss.adapters.method import METHODS, LinearMethod, find_methods
from rwkv_miss.adapters.plan import Plan, is_target, linear_shapes
from rwkv_miss.adapters.whole import METHOD as WHOLE
from rwkv_miss.adapters.whole import matches
from rwkv_miss.checkpoint import check_plain, read_safetensors, write_safetensors
from rwkv_miss.config import AdapterConfig, ModelConfig
from rwkv_miss.errors import UserError
from rwkv_miss.files import atomic_write, check_name
from rwkv_miss.fingerprints import is_of_base
from rwkv_miss.model.base import RWKV
from rwkv_miss.model.initial_state import is_state, state_shapes
from rwkv_miss.model.versions import MODELS

CONFIG, WEIGHTS, OURS = "adapter_config.json", "adapter_model.safetensors", "rwkv_miss.json"
_PREFIX = "base_model.model."
# What is read of the facts in `OURS`, all of which may be missing.
_FACTS = {"base_fingerprint": str, "step": int, "val_loss": float}
_OUR_TYPE = "RWKV_MISS"


@dataclass(frozen=True)
class AdapterFile:
    """An adapter folder, read.

    tensors: what was trained, by key. For a parameter of the base or a layer's learned state (in its in-memory layout)
        this is the checkpoint's key; for a tensor beside a linear, the linear's path and the tensor's name, such as
        blocks.0.att.key.miss_block.
    base_fingerprint: identifies the base; None if the program that made the adapter does not record it.
    """

    config: AdapterConfig
    tensors: dict[str, Tensor]
    base_fingerprint: str | None

    @property
    def linears(self) -> dict[str, dict[str, Tensor]]:
        """The path of each adapted linear -> its tensors by their names in `LinearMethod.names`."""
        found: dict[str, dict[str, Tensor]] = {}
        for key, tensor in self.tensors.items():
            if place := _place(key, self.config):
                found.setdefault(place[0], {})[place[1]] = tensor
        return found

    @property
    def whole(self) -> dict[str, Tensor]:
        """Checkpoint key -> tensor, of those that were trained directly."""
        return {key: tensor for key, tensor in self.tensors.items() if _place(key, self.config) is None}


def save_adapter(model: RWKV, folder: str | os.PathLike, extra: dict[str, Any] | None = None) -> None:
    """Writes the model's trained tensors to a folder. Each file is written beside the old one and then renamed.

    Args:
        extra: further facts for `rwkv_miss.json`, such as the tokenizer.

    Raises:
        UserError: the model has no adapter, or a file cannot be written; the folder is then unchanged.
    """
    config, plan = installed(model).config, installed(model).plan
    modules = _modules(model, plan)
    linear = _linear_method(config)
    if linear and plan.linears and modules is not None and config.method in METHODS:
        peft: dict[str, Any] = {"peft_type": linear.peft_type}
    else:
        peft = {"peft_type": _OUR_TYPE, "method": config.method}
    peft |= {
        "task_type": None,
        "base_model_name_or_path": None,
        **(linear.to_peft(config) if linear else {}),
        "target_modules": (config.target_modules or list(model.linears)) if plan.linears else None,
        "modules_to_save": modules or config.modules_to_save,
        "inference_mode": True,
    }
    ours = {"rwkv_miss": rwkv_miss.__version__, "base_fingerprint": model.fingerprint, **(extra or {})}
    tensors = {f"{_PREFIX}{key}": p.detach().contiguous().cpu() for key, p in trained_parameters(model).items()}
    folder = Path(folder)
    # All three are written before the first is renamed: on a full disk the old adapter stays as it was.
    with ExitStack() as renames:
        for name, content in ((OURS, ours), (CONFIG, peft)):
            part = renames.enter_context(atomic_write(folder / name))
            part.write_text(json.dumps(content, indent=2) + "\n")
        part = renames.enter_context(atomic_write(folder / WEIGHTS))
        write_safetensors(part, tensors, {"format": "pt"})


def _modules(model: RWKV, plan: Plan) -> list[str] | None:
    """The ends of the names of the modules whose parameters make up `plan.whole`; None unless they are whole modules of
    PyTorch's, which PEFT can replace by copies."""
    paths = {key.rpartition(".")[0] for key in plan.whole}
    for module in map(model.get_submodule, paths):
        is_plain = isinstance(module, (nn.LayerNorm, nn.GroupNorm, nn.Embedding, nn.Linear))
        if not is_plain or not all(p.requires_grad for p in module.parameters()):
            return None
    ends = {re.sub(r"^blocks\.\d+\.", "", path) for path in paths}  # ln1 for blocks.0.ln1, blocks.1.ln1, ...
    names = [checkpoint_key(name) for name, _ in model.named_parameters()]
    meant = {key for key in names if any(matches(key, end) for end in ends)}
    return sorted(ends if meant == set(plan.whole) else paths)


def read_adapter(folder: str | os.PathLike) -> AdapterFile:
    """Reads an adapter folder, ours or HF PEFT's, or the folder of a run that holds one.

    Raises:
        UserError: no such folder, a damaged file, another method or variant, or keys that are no adapter's.
    """
    folder = adapter_folder(folder)
    file = folder / CONFIG
    peft = _read_json(file)
    config = _settings(peft, str(file))
    if not (folder / WEIGHTS).is_file():
        other = folder / "adapter_model.bin"
        hint = (
            f"there is {other.name}, PEFT's older format, which is a pickle and is not read: save the adapter again "
            "with a PEFT that writes safetensors"
            if other.is_file()
            else "the adapter folder is incomplete"
        )
        raise UserError(f"{folder / WEIGHTS}: no such file; {hint}")
    tensors = read_safetensors(folder / WEIGHTS)
    check_plain(tensors, folder / WEIGHTS)
    if strange := [key for key in tensors if not key.startswith(_PREFIX)]:
        raise UserError(f"{folder / WEIGHTS}: key {strange[0]} is not a part of an adapter; expected {_PREFIX}...")
    tensors = {key.removeprefix(_PREFIX): tensor for key, tensor in tensors.items()}
    found = AdapterFile(config, tensors, read_facts(folder).get("base_fingerprint"))
    # PEFT has further ways to choose linears: a pattern, and what to leave out of a list. The tensors show which
    # linears were chosen.
    is_limited = any(peft.get(name) is not None for name in ("layers_to_transform", "exclude_modules"))
    if is_limited or not isinstance(peft.get("target_modules"), list):
        config.target_modules = sorted(found.linears) or None
    return found


def _settings(peft: dict[str, Any], file: str) -> AdapterConfig:
    """The settings in adapter_config.json."""
    kinds = {name: find_methods(name)[0] for name in METHODS}
    types = {method.peft_type: name for name, method in kinds.items() if isinstance(method, LinearMethod)}
    if peft.get("peft_type") == _OUR_TYPE:
        method = peft.get("method")
        if not isinstance(method, str) or not set(method.split("+")) <= METHODS.keys():
            raise UserError(f"{file}: method is {method!r}; this version has: {', '.join(METHODS)}")
    else:
        method = types.get(str(peft.get("peft_type")))
        if method is None:
            raise UserError(
                f"{file}: peft_type is {peft.get('peft_type')!r}; only {', '.join(types)} adapters can be read"
            )
    targets, modules = peft.get("target_modules"), peft.get("modules_to_save")
    for name, value in (("target_modules", targets), ("modules_to_save", modules)):
        if isinstance(value, list) and not all(isinstance(item, str) for item in value):
            raise UserError(f"{file}: {name} is {value}; expected names")
    config = AdapterConfig(
        method=method,
        target_modules=sorted(targets) if isinstance(targets, list) else None,
        modules_to_save=sorted(modules) if isinstance(modules, list) and modules else None,
    )
    if linear := _linear_method(config):
        for name, value in linear.from_peft(peft, file).items():
            setattr(config, name, value)
    return config


def adapter_folder(path: str | os.PathLike) -> Path:
    """The adapter folder that `path` means: itself, or the folder `adapter` inside it if `path` is a run's folder.

    Raises:
        UserError: there is no such folder.
    """
    folder = Path(path)
    check_name(folder, "a folder")
    if folder.is_file():
        raise UserError(f"{folder}: is a file; an adapter is a folder with {CONFIG} and {WEIGHTS}, such as RUN/adapter")
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected an adapter folder with {CONFIG} and {WEIGHTS}")
    inside = folder / "adapter"
    return inside if not (folder / CONFIG).exists() and (inside / CONFIG).exists() else folder


def read_facts(folder: str | os.PathLike) -> dict[str, Any]:
    """The content of `rwkv_miss.json` in an adapter folder: base, tokenizer, ...; empty for an adapter made by PEFT."""
    path = Path(folder) / OURS
    if not path.exists():
        return {}
    facts = _read_json(path)
    for name, kind in _FACTS.items():
        if not isinstance(value := facts.get(name), (kind, type(None))) or value != value:
            raise UserError(f"{path}: {name} is {value!r:.80}; the file is damaged")
    return facts


def add_facts(folder: str | os.PathLike, facts: dict[str, Any]) -> None:
    """Writes further facts to an adapter folder's `rwkv_miss.json`. Raises UserError if it cannot be written."""
    with atomic_write(Path(folder) / OURS) as part:
        part.write_text(json.dumps(read_facts(folder) | facts, indent=2) + "\n")


def check_fits(
    adapter: AdapterFile,
    sizes: ModelConfig,
    shapes: Mapping[str, torch.Size],
    base_mark: str,
    folder: str | os.PathLike,
) -> Plan:
    """Checks that the adapter was made for this base, has all that its config says was trained, and nothing that the
    base has no place for. Returns what it trained of the base.

    Args:
        shapes: the shapes of the base's tensors by their keys.
        base_mark: the base's fingerprint.

    Raises:
        UserError: the adapter does not fit.
    """
    if (recorded := adapter.base_fingerprint) is not None and not is_of_base(recorded, base_mark):
        raise UserError(
            f"{folder}: the adapter was trained on another base (fingerprint {recorded[:12]}; this one "
            f"has {base_mark[:12]}); give the base it was trained on"
        )
    unused = MODELS[sizes.version].unused
    shapes = {key: shape for key, shape in shapes.items() if key not in unused}
    linears = _check_linears(adapter, sizes, shapes, folder)
    whole = _check_whole(adapter, sizes, shapes, folder)
    for key, tensor in adapter.tensors.items():
        if not torch.isfinite(tensor).all():
            raise UserError(f"{Path(folder) / WEIGHTS}: {key} has values that are not finite; the run had diverged")
    trainers = {key: method for method in find_methods(adapter.config.method) for key in method.keys(sizes, shapes)}
    return Plan(linears, {key: trainers.get(key, WHOLE) for key in whole})


def _check_whole(
    adapter: AdapterFile, sizes: ModelConfig, shapes: Mapping[str, torch.Size], folder: str | os.PathLike
) -> list[str]:
    """The keys of the tensors that were trained directly."""
    config, file = adapter.config, Path(folder) / WEIGHTS
    known = {**shapes, **state_shapes(sizes)}
    linears = adapter.linears
    for key, tensor in adapter.whole.items():
        if key not in known or key.removesuffix(".weight") in linears:
            why = "is no part of this base" if key not in known else "is the weight of a linear that has an adapter too"
            raise UserError(f"{file}: the adapter has {_PREFIX}{key}, which {why}; nothing would use it")
        if tensor.shape != known[key]:
            raise UserError(f"{file}: {key} has shape {tuple(tensor.shape)}, expected {tuple(known[key])}")
    wanted = [key for method in find_methods(config.method) for key in method.keys(sizes, shapes)]
    wanted += [key for key in shapes if any(matches(key, name) for name in config.modules_to_save or [])]
    if any(map(is_state, adapter.tensors)):
        wanted += state_shapes(sizes)
    if missing := [key for key in wanted if key not in adapter.tensors]:
        raise UserError(f"{folder}: {CONFIG} says that {missing[0]} was trained but {WEIGHTS} does not have it")
    return list(adapter.whole)


def _check_linears(
    adapter: AdapterFile, sizes: ModelConfig, shapes: Mapping[str, torch.Size], folder: str | os.PathLike
) -> dict[str, LinearMethod]:
    """The linears that the adapter goes beside, with the method."""
    config, method, found = adapter.config, _linear_method(adapter.config), adapter.linears
    there = linear_shapes(sizes, shapes)
    if unknown := [path for path in found if path not in there]:
        possible = ", ".join(MODELS[sizes.version].linears)
        raise UserError(
            f"{folder}: the adapter goes beside {unknown[0]}, "
            + (
                f"which is beyond what can be adapted here ({possible}); train it with these as its target_modules"
                if f"{unknown[0]}.weight" in shapes
                else "which this base does not have; give the base that it was trained on"
            )
        )
    if method is None:
        return {}
    targets = config.target_modules or []
    wanted = {path: method.names for path in there if any(is_target(path, name) for name in targets)}
    for path, names in (wanted | {path: method.names for path in found}).items():
        if missing := [name for name in names if name not in found.get(path, {})]:
            raise UserError(f"{folder}: {CONFIG} names {path} as a target but {WEIGHTS} has no {missing[0]} for it")
    for path, tensors in found.items():
        out_features, in_features = there[path]
        if reason := method.refuses(in_features, out_features, config):
            raise UserError(f"{folder}: {path}: {reason}")
        for name, expected in method.shapes(in_features, out_features, config).items():
            if tuple(tensors[name].shape) != expected:
                raise UserError(
                    f"{folder}: {path}.{name} has shape {tuple(tensors[name].shape)}; the linear is {in_features} -> "
                    f"{out_features} and {CONFIG} says r = {config.r}, so expected {expected}"
                )
    return {path: method for path in there if path in found}


def load_adapter(model: RWKV, folder: str | os.PathLike) -> RWKV:
    """Adds a saved adapter to a model that has none, in place; all other parameters are frozen, as by `inject`.

    Args:
        folder: an adapter folder, or a run's folder, whose `adapter` is used.

    Raises:
        UserError: as `read_adapter` and `check_fits`; or the model has an adapter already.
    """
    refuse_second(model)
    adapter = read_adapter(folder)
    plan = check_fits(adapter, model.config, base_shapes(model), model.fingerprint, folder)
    install(model, adapter.config, plan)
    trained = trained_parameters(model)
    for key, tensor in adapter.tensors.items():
        trained[key].data.copy_(tensor)
    return model


def _linear_method(config: AdapterConfig) -> LinearMethod | None:
    """The one of the config's methods that goes beside linears."""
    return next((method for method in find_methods(config.method) if isinstance(method, LinearMethod)), None)


def _place(key: str, config: AdapterConfig) -> tuple[str, str] | None:
    """(the linear's path, the tensor's name) if `key` is that of a tensor beside a linear; None otherwise."""
    method = _linear_method(config)
    for name in method.names if method else ():
        if key.endswith("." + name):
            return key.removesuffix("." + name), name
    return None


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path}: no such file; the adapter folder is incomplete")
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as e:  # also a number of too many digits, and nesting too deep
        raise UserError(f"{path}: not JSON ({e})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}; expected an object")
    return content
