"""What this machine can run, which backend `auto` takes here, and why others cannot be used."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import combinations as some_of
from itertools import product
from pathlib import Path

import torch

from rwkv_miss.adapters.method import METHODS, problems
from rwkv_miss.adapters.plan import make_plan
from rwkv_miss.config import OFFLOADS, QUANTS, STRATEGIES, AdapterConfig, ModelConfig, TrainConfig
from rwkv_miss.errors import UserError
from rwkv_miss.files import cache_folder
from rwkv_miss.model.init import new_config
from rwkv_miss.model.quantised import quantised_linears, refuse_training
from rwkv_miss.model.quantised import unusable as quant_unusable
from rwkv_miss.model.recognise import parameter_shapes
from rwkv_miss.ops.cuda.wkv import kernel_taken
from rwkv_miss.ops.dispatch import NATIVE, unusable

_LIBRARIES = ("lightning", "deepspeed", "bitsandbytes", "cuda-bindings", "fla-core", "rwkv")
# The head size of every RWKV-6 and RWKV-7 that BlinkDL has released.
_HEAD_SIZE = 64
_FORMATS = [quant for quant in QUANTS if quant != "none"]
_WITH_MODULES = " with modules_to_save"
# The dtypes that a model runs in.
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Diagnosis:
    """`found`: pairs (what was looked at, what was found), in the order to print. `chosen`: the backend that `auto`
    takes here. `is_native`: whether it is compiled code and not the slower PyTorch path."""

    found: list[tuple[str, str]]
    chosen: str
    is_native: bool


def machine() -> list[tuple[str, str]]:
    """Pairs (what was looked at, what was found): the system, its devices and the libraries. Compiles nothing."""
    threads = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    found = [
        (
            "system",
            f"{platform.system()} {platform.release()} {platform.machine()}, Python {platform.python_version()}",
        ),
        ("torch", f"{torch.__version__}, built for {_built_for()}"),
        ("CPU", ", ".join(filter(None, (_cpu_name(), threads)))),
    ]
    if hasattr(os, "sysconf"):
        found.append(("memory", f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB"))
    gpus, error = _gpus()
    for i, gpu in enumerate(gpus):
        chip = gpu.gcnArchName if torch.version.hip else f"sm_{gpu.major}{gpu.minor}"
        found.append((f"GPU {i}", f"{gpu.name}, {chip}, {gpu.total_memory / 2**30:.0f} GiB"))
    intel = _intel_gpus()
    found += [(f"GPU xpu:{i}", name) for i, name in enumerate(intel)]
    if error:
        found.append(("GPU", f"torch cannot use it: {error}"))
    elif not gpus and not intel:
        found.append(("GPU", "torch finds none"))
    return found + [(name, _version(name)) for name in _LIBRARIES]


def diagnose() -> Diagnosis:
    """Looks at the devices and tries every backend, compiling what it needs."""
    found = machine()
    gpus, error = _gpus()
    intel = _intel_gpus()
    folder = cache_folder()
    found.append(("compiled code", f"{folder} ({_writable(folder)})"))

    none = "torch cannot use the GPU" if error else "there is no GPU"
    reasons = {
        "cuda": _reason("cuda", torch.device("cuda", 0)) if gpus else none,
        "fla": _reason("fla", torch.device("cuda" if gpus else "xpu", 0)) if gpus or intel else none,
        "cpu": _reason("cpu", torch.device("cpu")),
        "torch": None,
    }
    taken = f": RWKV-7 by {kernel_taken('wkv7', torch.device('cuda', 0), torch.bfloat16, _HEAD_SIZE)}" if gpus else ""
    works = {"cuda": f"works{taken}"}
    found += [(f"backend {name}", f"no: {x}" if x else works.get(name, "works")) for name, x in reasons.items()]
    device = torch.device("cuda", 0) if gpus else torch.device("cpu")
    found += [(f"quant {quant}", _quant_works(quant, device)) for quant in _FORMATS]
    found += combinations()
    # Commands run on the GPUs that torch calls cuda (NVIDIA's and AMD's), or on the CPU.
    chosen = next((name for name in NATIVE["cuda" if gpus else "cpu"] if not reasons[name]), "torch")
    return Diagnosis(found, chosen, chosen != "torch")


def combinations() -> list[tuple[str, str]]:
    """For each way to share the work, what can be trained in it, by the checks that a run makes of its settings."""
    names = ["+".join(names) for count in (1, 2) for names in some_of(METHODS, count)]
    adapters = {name: AdapterConfig(name) for name in names}
    adapters |= {name + _WITH_MODULES: AdapterConfig(name, modules_to_save=["ln"]) for name in names}
    has_deepspeed, has_bitsandbytes = (importlib.util.find_spec(x) is not None for x in ("deepspeed", "bitsandbytes"))
    sizes = new_config(7, n_layer=1, n_embd=64, vocab_size=256)
    shapes = parameter_shapes(sizes)
    planned = {
        quant: {name for name, x in adapters.items() if _is_possible(x, quant, sizes, shapes)} for quant in QUANTS
    }
    found = []
    for strategy, offload, quants in product(STRATEGIES, OFFLOADS, (["none"], _FORMATS)):
        way = {"strategy": strategy, "offload": offload}
        configs = [TrainConfig(base="", data="", tokenizer="", out=".", quant=quant, **way) for quant in quants]
        if any(config.problems() for config in configs):
            continue
        works = ", ".join(
            name
            for name, x in adapters.items()
            if all(name in planned[config.quant] and not problems(x, config) for config in configs)
        )
        if strategy.startswith("deepspeed") and not has_deepspeed:
            works = "no: deepspeed is not installed"
        elif quants == _FORMATS and not has_bitsandbytes:
            works = "no: bitsandbytes is not installed"
        chosen = {"strategy": strategy, "offload": offload, "quant": " or ".join(quants)}
        found.append((", ".join(f"{name} {value}" for name, value in chosen.items() if value != "none"), works))
    return [*found, ("precision", "bf16, fp32 (fp16 is for files)")]


def shortened(lines: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Lines of a diagnosis for people: ways that train the same share a line, and each name is said once."""
    ways: dict[str, list[str]] = {}
    for way, works in lines:
        if way.startswith("strategy "):
            ways.setdefault(works, []).append(way)
    found = [line for line in lines if not line[0].startswith("strategy ")]
    for works, alike in ways.items():
        names = works.split(", ")
        if alone := [name for name in names if name + _WITH_MODULES in names]:
            rest = [name for name in names if name not in alone and not name.endswith(_WITH_MODULES)]
            works = f"{', '.join(alone)}, each also{_WITH_MODULES}" + (f"; {', '.join(rest)}" if rest else "")
        found += [("can be trained", works), ("  by", "; ".join(alike))]
    return found


def _is_possible(adapter: AdapterConfig, quant: str, sizes: ModelConfig, shapes: Mapping[str, torch.Size]) -> bool:
    """Whether it can be trained on a base of these sizes that is quantised so, whatever the strategy."""
    try:
        plan = make_plan(adapter, sizes, shapes)
        if quant != "none":
            refuse_training(plan.whole, quantised_linears(sizes, quant, None))
    except UserError:
        return False
    return not adapter.problems()


def _quant_works(quant: str, device: torch.device) -> str:
    """In which dtypes a base can be quantised on a device, or why in none."""
    reasons = {name: quant_unusable(quant, dtype, device) for name, dtype in _DTYPES.items()}
    works = [name for name, reason in reasons.items() if not reason]
    return f"works on {device} in {', '.join(works)}" if works else f"no: {reasons['bf16']}"


def _gpus() -> tuple[list, str | None]:
    """The properties of the GPUs that torch calls cuda, or why torch cannot use them: it can count GPUs whose driver is
    too old to use, since counting does not load the driver's library."""
    try:
        return [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())], None
    except RuntimeError as error:
        return [], str(error)


def _intel_gpus() -> list[str]:
    return [torch.xpu.get_device_name(i) for i in range(torch.xpu.device_count())]


def _cpu_name() -> str:
    """The processor's name as Linux tells it; what Python knows of it elsewhere, which may be nothing."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def _reason(backend: str, device: torch.device) -> str | None:
    """Why a backend cannot be used for RWKV-6 or RWKV-7; None if it can be used for both."""
    reasons = {op: unusable(op, backend, device, torch.bfloat16, _HEAD_SIZE) for op in ("wkv6", "wkv7")}
    if len(set(reasons.values())) == 1:
        return reasons["wkv7"]
    return "; ".join(f"{op} {reason or 'works'}" for op, reason in reasons.items())


def _built_for() -> str:
    if torch.version.cuda:
        return f"CUDA {torch.version.cuda}"
    return f"ROCm {torch.version.hip}" if torch.version.hip else "the CPU alone"


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _writable(folder: Path) -> str:
    while not folder.exists():
        folder = folder.parent
    return "can be written" if folder.is_dir() and os.access(folder, os.W_OK) else "cannot be written"
