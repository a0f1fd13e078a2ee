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
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn

import rwkv_miss
from rwkv_miss.adapters.inject import (
    DEFAULT,
    base_shapes,
    checkpoint_key,
    held_tensors,
    install,
    installed,
    put_in,
    take_out,
)
from rwkv_miss.adapters.method import METHODS, SELECTION, LinearMethod, find_methods, linear_methods, problems
from rwkv_miss.adapters.plan import Beside, Plan, beside, linear_shapes, select
from rwkv_miss.adapters.whole import METHOD as WHOLE
from rwkv_miss.adapters.whole import matches
from rwkv_miss.checkpoint import check_plain, read_safetensors, write_safetensors
from rwkv_miss.config import AdapterConfig, ModelConfig
from rwkv_miss.errors import UserError
from rwkv_miss.files import atomic_write, check_name
from rwkv_miss.fingerprints import is_of_base
from rwkv_miss.model.base import RWKV
from rwkv_miss.model.initial_state import is_state, state_shapes
from rwkv_miss.model.recognise import parameter_shapes
from rwkv_miss.model.versions import MODELS

CONFIG, WEIGHTS, OURS, CARD = "adapter_config.json", "adapter_model.safetensors", "rwkv_miss.json", "README.md"
_PREFIX = "base_model.model."
# What is read of the facts in `OURS`, all of which may be missing.
_FACTS = {
    **{"method": str, "base_fingerprint": str, "step": int, "val_loss": float, "quant": str, "template": str},
    **{"tokenizer": str, "card": dict, "command": str},
}
_OUR_TYPE = "RWKV_MISS"
_OUR_FIELDS = ("method", "method_pattern", "options")
"""The settings that stand under their own names in a folder of our type, beside those in PEFT's format."""
_NO_SETTINGS = (
    *("peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode"),
    "peft_version",
)
"""Fields of every adapter_config.json that change nothing of what is computed."""


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
    def held(self) -> dict[str, Tensor]:
        """The tensors as a model holds them (`held_tensors`)."""
        found = self.whole
        for path, tensors in self.linears.items():
            own = beside(self.config, path).method.from_file(tensors)
            found |= {f"{path}.{name}": tensor for name, tensor in own.items()}
        return found

    @property
    def whole(self) -> dict[str, Tensor]:
        """Checkpoint key -> tensor, of those that were trained directly."""
        return {key: tensor for key, tensor in self.tensors.items() if _place(key, self.config) is None}


def save_adapter(
    model: RWKV, folder: str | os.PathLike, extra: dict[str, Any] | None = None, card: str | None = None
) -> None:
    """Writes the model's trained tensors to a folder. Each file is written beside the old one and then renamed.

    Args:
        extra: further facts for `rwkv_miss.json`, such as the tokenizer.
        card: the text of a model card, which is README.md in PEFT's folders.

    Raises:
        UserError: the model has no adapter, or a file cannot be written; the folder is then unchanged.
    """
    config, plan = installed(model).config, installed(model).plan
    modules = _modules(model, plan)
    linear = _first_linear(config)
    if (in_peft := peft_method(model)) is not None:
        peft: dict[str, Any] = {"peft_type": in_peft.peft_type}
    else:
        peft = {"peft_type": _OUR_TYPE, **{name: getattr(config, name) for name in _OUR_FIELDS}}
    if config.rank_pattern:
        peft["rank_pattern"] = config.rank_pattern
    peft |= linear.to_peft(config) if linear else {}
    peft |= {
        "task_type": None,
        "base_model_name_or_path": None,
        "target_modules": _target_names(model, config, plan) if plan.linears else None,
        "modules_to_save": modules or config.modules_to_save,
        "inference_mode": True,
    }
    ours = {
        "rwkv_miss": rwkv_miss.__version__,
        "method": config.method,
        "base_fingerprint": model.fingerprint,
        **(extra or {}),
    }
    tensors = {f"{_PREFIX}{key}": t.contiguous().cpu() for key, t in _to_file(model, plan).items()}
    folder = Path(folder)
    texts = {name: json.dumps(content, indent=2) + "\n" for name, content in ((OURS, ours), (CONFIG, peft))}
    # All are written before the first is renamed: on a full disk the old adapter stays as it was.
    with ExitStack() as renames:
        for name, text in (texts if card is None else {CARD: card, **texts}).items():
            part = renames.enter_context(atomic_write(folder / name))
            part.write_text(text, encoding="utf-8", errors="replace")
        part = renames.enter_context(atomic_write(folder / WEIGHTS))
        write_safetensors(part, tensors, {"format": "pt"})


def peft_method(model: RWKV) -> LinearMethod | None:
    """The method beside the model's linears, if HF PEFT can load all that was trained."""
    config, plan = installed(model).config, installed(model).plan
    method = _first_linear(config)
    if method is None or config.method not in METHODS or _modules(model, plan) is None:
        return None
    is_alone = {beside.method for beside in plan.linears.values()} == {method}
    return method if is_alone and method.fits_peft(config) else None


def _to_file(model: RWKV, plan: Plan) -> dict[str, Tensor]:
    """Everything that the model holds beyond the frozen base, as an adapter's file has it."""
    held = {key: tensor.detach() for key, tensor in held_tensors(model).items()}
    found = {key: held[key] for key in plan.whole}
    for path, (method, _) in plan.linears.items():
        own = {key.removeprefix(f"{path}."): tensor for key, tensor in held.items() if key.startswith(f"{path}.")}
        found |= {f"{path}.{name}": tensor for name, tensor in method.to_file(own).items()}
    return found


def _target_names(model: RWKV, config: AdapterConfig, plan: Plan) -> list[str]:
    """Ends of the names of the linears in `plan`; their whole names where those mean others too. PEFT chooses among all
    linears, the head included, so that its other ways to choose could mean more there than here."""
    ends = config.target_modules if isinstance(config.target_modules, list) else list(model.linears)
    linears = linear_shapes(model.config, parameter_shapes(model.config))
    meant = select(AdapterConfig(target_modules=ends), linears)
    return ends if meant == list(plan.linears) and not config.exclude_modules else list(plan.linears)


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
    facts = read_facts(folder)
    config = _settings(peft, facts.get("method"), str(file))
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
    return AdapterFile(config, tensors, facts.get("base_fingerprint"))


def _settings(peft: dict[str, Any], recorded: str | None, file: str) -> AdapterConfig:
    """The settings in adapter_config.json.

    Args:
        recorded: the method that wrote the folder, if known: it decides where several methods can read it.
    """
    is_ours = peft.get("peft_type") == _OUR_TYPE
    config = AdapterConfig()
    for name in (*SELECTION, *(_OUR_FIELDS if is_ours else ())):
        value = peft.get(name)
        if name == "layers_pattern" and isinstance(value, list):
            value = "|".join(map(str, value))
        if value in (None, [], {}, ""):
            continue
        kind = get_type_hints(AdapterConfig)[name]
        if not _has_type(value, kind):
            raise UserError(f"{file}: {name} is {value!r:.80}; expected {kind}")
        setattr(config, name, sorted(value) if isinstance(value, list) else value)
    if config.layers_to_transform is None:
        config.layers_pattern = None  # PEFT does not use it either
    if not is_ours:
        config.method = _find_peft(peft, recorded, file)
    for name in (*config.method.split("+"), *(config.method_pattern or {}).values()):
        if name not in METHODS:
            raise UserError(f"{file}: method is {name!r}; this version has: {', '.join(METHODS)}")
    if linear := _first_linear(config):
        for name, value in linear.from_peft(peft, file).items():
            setattr(config, name, config.options | value if name == "options" else value)
        _refuse_unknown(peft, linear, config, file)
    if found := config.problems() + problems(config):
        raise UserError(f"{file}: {'; '.join(found)}")
    return config


def _find_peft(peft: dict[str, Any], recorded: str | None, file: str) -> str:
    """The name of the method that a folder in PEFT's format was trained with."""
    methods = {name: method for name in METHODS for method in find_methods(name) if isinstance(method, LinearMethod)}
    if readers := [name for name, method in methods.items() if method.reads(peft)]:
        return recorded if recorded in readers else readers[0]
    types = dict.fromkeys(method.peft_type for method in methods.values())
    if str(peft.get("peft_type")) not in types:
        raise UserError(f"{file}: peft_type is {peft.get('peft_type')!r}; only {', '.join(types)} adapters can be read")
    said = [f"{name} is {v!r:.40}" for name, v in peft.items() if isinstance(v, str) and name not in _NO_SETTINGS]
    raise UserError(f"{file}: there is no form of {peft['peft_type']} with these settings: {', '.join(said)}")


def _refuse_unknown(peft: dict[str, Any], method: LinearMethod, config: AdapterConfig, file: str) -> None:
    """UserError for a field of adapter_config.json that asks for something and that nothing here reads."""
    known = {*SELECTION, *_OUR_FIELDS, *_NO_SETTINGS, *method.to_peft(config)}
    for name, value in peft.items():
        if name not in known and value and value != method.peft_neutral.get(name):
            raise UserError(f"{file}: {name} is {value!r:.80}, which cannot be honoured here")


def _has_type(value: Any, kind: Any) -> bool:
    """Whether a value from a JSON file has the type of a setting."""
    inner = get_args(kind)
    if get_origin(kind) is UnionType:
        return any(_has_type(value, one) for one in inner)
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_has_type(item, inner[0]) for item in value)
    if get_origin(kind) is dict:
        return isinstance(value, dict) and all(_has_type(item, inner[1]) for item in value.values())
    return kind is Any or type(value) is kind


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
    if not all(isinstance(section, dict) for section in (facts.get("card") or {}).values()):
        raise UserError(f"{path}: card is {facts['card']!r:.80}; the file is damaged")
    return facts


def adapters_template(folder: str | os.PathLike | None) -> str | None:
    """The template that the adapter in a folder, or in a run's, was trained with; None where none is recorded."""
    return read_facts(adapter_folder(folder)).get("template") if folder else None


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
) -> dict[str, Beside]:
    """The linears that the adapter goes beside, with what goes there."""
    config, found = adapter.config, adapter.linears
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
    if not linear_methods(config):
        return {}
    # PEFT puts nothing beside a linear that is trained whole.
    chosen = [path for path in select(config, there) if path in found or f"{path}.weight" not in adapter.tensors]
    if more := [path for path in found if path not in chosen]:
        raise UserError(f"{folder}: {WEIGHTS} has an adapter for {more[0]}, which is no target in {CONFIG}")
    plan = {path: beside(config, path) for path in chosen}
    for path, (method, own) in plan.items():
        tensors = found.get(path, {})
        if missing := [name for name in method.names if name not in tensors]:
            raise UserError(f"{folder}: {CONFIG} names {path} as a target but {WEIGHTS} has no {missing[0]} for it")
        if more := [name for name in tensors if name not in method.names]:
            raise UserError(f"{folder}: {WEIGHTS} has {path}.{more[0]}, which method {own.method} does not")
    for path, (method, own) in plan.items():
        out_features, in_features = there[path]
        if reason := method.refuses(in_features, out_features, own):
            raise UserError(f"{folder}: {path}: {reason}")
        for name, expected in method.shapes(in_features, out_features, own).items():
            if (shape := tuple(found[path][name].shape)) != expected:
                raise UserError(
                    f"{folder}: {path}.{name} has shape {shape}; the linear is {in_features} -> "
                    f"{out_features} and {CONFIG} says r = {own.r}, so expected {expected}"
                )
    return plan


def load_adapter(model: RWKV, folder: str | os.PathLike, name: str = DEFAULT) -> RWKV:
    """Adds a saved adapter to a model, in place; all other parameters are frozen, as by `inject`. It is then in use; of
    several, `rwkv_miss.adapters.several.set_adapter` chooses.

    Args:
        folder: an adapter folder, or a run's folder, whose `adapter` is used.

    Raises:
        UserError: as `read_adapter` and `check_fits`; or the model has an adapter of that name already.
    """
    if name in model.adapters:
        raise UserError(f"the model has an adapter already whose name is {name}; give this one another name")
    return add_adapter(model, read_adapter(folder), folder, name)


def add_adapter(model: RWKV, adapter: AdapterFile, folder: str | os.PathLike, name: str = DEFAULT) -> RWKV:
    """As `load_adapter`, of an adapter that has been read from `folder`."""
    before = take_out(model)
    try:
        plan = check_fits(adapter, model.config, base_shapes(model), model.fingerprint, folder)
        install(model, adapter.config, plan, adapter.whole, name)  # into tensors of their own, beside the base's
    except UserError:
        if before:
            put_in(model, before)
        raise
    held = held_tensors(model)
    for key, tensor in adapter.held.items():
        held[key].data.copy_(tensor)
    return model


def _first_linear(config: AdapterConfig) -> LinearMethod | None:
    """The one of the methods in `config.method` that goes beside linears."""
    return next(iter(linear_methods(config).values()), None)


def _place(key: str, config: AdapterConfig) -> tuple[str, str] | None:
    """(the linear's path, the tensor's name) if `key` is that of a tensor beside a linear; None otherwise."""
    for method in linear_methods(config).values():
        for name in method.names:
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
