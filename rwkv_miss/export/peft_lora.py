"""An adapter as a folder of HF PEFT's for the model in a folder of `rwkv_miss.export.hf`: LoRA, whose factor
lora_alpha / r is 1."""

from __future__ import annotations

import json
from pathlib import Path

from torch import Tensor

from rwkv_miss.adapters.files import CONFIG, WEIGHTS
from rwkv_miss.adapters.method import Factors
from rwkv_miss.checkpoint import read_safetensors
from rwkv_miss.export import hf
from rwkv_miss.export.hf_runtime import log_probs
from rwkv_miss.export.lora import write_lora
from rwkv_miss.export.target import Adapter, AdapterTarget, Runtime, named_dtype

_PREFIX = "base_model.model."
_A, _B = ".lora_A.weight", ".lora_B.weight"


def _module(linear: str) -> str:
    return hf.name_of(f"{linear}.weight").removesuffix(".weight")


def _tensors(linear: str, product: tuple[Tensor, ...]) -> dict[str, Tensor]:
    A, B = product
    return {f"{_PREFIX}{_module(linear)}{_A}": A, f"{_PREFIX}{_module(linear)}{_B}": B}


def _write(path: Path, adapter: Adapter) -> None:
    path.mkdir()
    write_lora(path / WEIGHTS, adapter, named_dtype(adapter.dtype), _tensors)
    ranks = {_module(linear): len(product.A) for linear, product in adapter.factors()}
    r = max(ranks.values())
    others = {module: rank for module, rank in ranks.items() if rank != r}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "target_modules": list(ranks),
        "r": r,
        "lora_alpha": r,
        "rank_pattern": others,
        "alpha_pattern": others,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
    (path / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def _read(path: Path) -> dict[str, Factors]:
    config, found = json.loads((path / CONFIG).read_text()), read_safetensors(path / WEIGHTS)
    products = {}
    for module in config["target_modules"]:
        A, B = (found[f"{_PREFIX}{module}{end}"].float() for end in (_A, _B))
        scale = config["alpha_pattern"].get(module, config["lora_alpha"]) / len(A)
        products[hf.path_of(module)] = Factors(A, scale * B)
    return products


_USE = """\
from peft import PeftModel
from rwkv7_hf import RWKV7ForCausalLM

model = PeftModel.from_pretrained(RWKV7ForCausalLM.from_pretrained("base-hf"), {out})"""

TARGET = AdapterTarget(
    "",
    _write,
    _read,
    dtypes=("f32", "f16", "bf16"),
    runtime=Runtime("peft", "peft", "hf", log_probs, needs=("rwkv7_hf",)),
    base="hf",
    check_sizes=hf.check_sizes,
    uses={"HF PEFT, on the base as a Hugging Face folder": ("python", _USE)},
)
