"""A Hugging Face folder of an RWKV-7, with the names of flash-linear-attention (its utils/convert_from_rwkv7.py), which
rwkv7-hf and the ports of RWKV-7 to vLLM and SGLang load too. transformers itself (5.24) has no RWKV-7."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rwkv_miss.checkpoint import read_safetensors
from rwkv_miss.config import ModelConfig
from rwkv_miss.errors import UserError
from rwkv_miss.export.hf_runtime import log_probs
from rwkv_miss.export.renamed import Place, swapped, write_renamed
from rwkv_miss.export.target import Runtime, Target, Text, Weights
from rwkv_miss.model.recognise import parameter_shapes
from rwkv_miss.model.versions import MODELS

_MODULES = {
    **{"emb": "model.embeddings", "ln_out": "model.norm", "head": "lm_head"},
    **{"ln0": "pre_norm", "ln1": "attn_norm", "ln2": "ffn_norm", "att": "attn", "att.ln_x": "attn.g_norm"},
    **{"att.receptance": "attn.r_proj", "att.key": "attn.k_proj", "att.value": "attn.v_proj"},
    "att.output": "attn.o_proj",
}
"""BlinkDL's names of modules, without the layer, and the folder's where they differ."""
_RANKS = {"w": "decay", "a": "a", "v": "v", "g": "gate"}
_LOW_RANK = {"0": "2.bias", "1": "0.weight", "2": "2.weight"}
_FLAT = re.compile(r"\.(att\.([wav]0|k_k|k_a)|ffn\.x_k)$")
"""Vectors of one dimension there, of three in BlinkDL's files."""
# The group norm's epsilon is there the norms' times the head size, and RWKV's is 64e-5 whatever the head size.
_EPSILON, _HEAD_SIZE = 1e-5, 64
_CONFIG, _WEIGHTS = "config.json", "model.safetensors"
_END = "<|endoftext|>"
_TOKENIZER = Path(__file__).parent / "tokenization_rwkv.py"
_VOCABULARY = "rwkv_vocab_v20230424.txt"  # the name that tokenization_rwkv.py, and rwkv7-hf, look for


def name_of(key: str) -> str:
    """The folder's name of the tensor with one of BlinkDL's keys."""
    *layer, part = re.split(r"^blocks\.(\d+)\.", key)[1:] or [key]
    if low_rank := re.fullmatch(r"att\.([wavg])([012])", part):
        part = f"attn.{low_rank[1]}_lora.lora.{_LOW_RANK[low_rank[2]]}"
    else:
        module, _, end = part.rpartition(".")
        part = f"{_MODULES.get(module, module)}.{end}"
    return f"model.layers.{layer[0]}.{part}" if layer else part


def path_of(name: str) -> str:
    """The path of the linear whose name in the folder is `name`."""
    _, _, layer, module = name.split(".", 3)
    [path] = [ours for ours, theirs in _MODULES.items() if theirs == module] or [module]
    return f"blocks.{layer}.{path}"


def check_sizes(sizes: ModelConfig) -> None:
    """UserError where no program would load such a folder, or would compute something else."""
    if sizes.version != 7:
        raise UserError(
            f"an RWKV-{sizes.version} has no Hugging Face folder that an installable program loads; export it "
            "with --to gguf or --to st"
        )
    if sizes.head_size != _HEAD_SIZE:
        raise UserError(
            f"the model has heads of {sizes.head_size}; what loads such folders computes another group norm "
            f"then, which is RWKV's for heads of {_HEAD_SIZE} alone; export it with --to gguf or --to st"
        )


def _place(key: str, shape: torch.Size) -> Place:
    if re.search(r"\.att\.[wavg][12]$", key):
        return swapped(name_of(key), shape)
    return Place(name_of(key), torch.Size([shape.numel()]) if _FLAT.search(key) else shape)


def _write(path: Path, weights: Weights) -> None:
    path.mkdir()
    places = {key: _place(key, spec.shape) for key, spec in weights.specs.items() if key not in MODELS[7].unused}
    write_renamed(path / _WEIGHTS, weights, places)
    (path / _CONFIG).write_text(json.dumps(_config(weights), indent=2) + "\n")
    if weights.text is not None:
        _write_text(path, weights.text)


def _config(weights: Weights) -> dict[str, Any]:
    sizes = weights.sizes
    [dtype] = {str(spec.dtype).removeprefix("torch.") for spec in weights.specs.values()}
    return {
        "architectures": ["RWKV7ForCausalLM"],
        "model_type": "rwkv7",
        "torch_dtype": dtype,
        "vocab_size": sizes.vocab_size,
        "hidden_size": sizes.n_embd,
        "intermediate_size": sizes.dim_ffn,
        "hidden_ratio": sizes.dim_ffn / sizes.n_embd,
        "num_hidden_layers": sizes.n_layer,
        "num_heads": sizes.n_head,
        "head_dim": sizes.head_size,
        # A single layer has no v.
        **{f"{long}_low_rank_dim": sizes.low_rank.get(name, 1) for name, long in _RANKS.items()},
        "value_dim": [sizes.n_embd] * sizes.n_layer,
        "hidden_act": "sqrelu",
        "attn_mode": "chunk",
        "norm_first": True,
        "norm_bias": True,
        "norm_eps": _EPSILON,
        "fuse_norm": False,
        "fuse_cross_entropy": False,
        "tie_word_embeddings": False,
        # Token 0 stands between documents, so a new one begins after it too.
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0),
    }


def _write_text(path: Path, text: Text) -> None:
    lines = [f"{i} {_literal(token)} {len(token)}\n" for i, token in enumerate(text.tokens) if i > 0]
    (path / _VOCABULARY).write_text("".join(lines), encoding="utf-8")
    shutil.copyfile(_TOKENIZER, path / _TOKENIZER.name)
    tokenizer = {
        "tokenizer_class": "RwkvTokenizer",
        "auto_map": {"AutoTokenizer": [f"{_TOKENIZER.stem}.RwkvTokenizer", None]},
        "eos_token": _END,
        "pad_token": _END,
        "clean_up_tokenization_spaces": False,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(tokenizer, indent=2) + "\n")
    if text.chat_template is not None:
        (path / "chat_template.jinja").write_text(text.chat_template, encoding="utf-8")


def _literal(token: bytes) -> str:
    """As the published vocabulary has it: a string, or bytes that are no UTF-8."""
    try:
        return repr(token.decode("utf-8"))
    except UnicodeDecodeError:
        return repr(token)


def _read(path: Path) -> dict[str, Tensor]:
    config = json.loads((path / _CONFIG).read_text())
    sizes = ModelConfig(
        version=7,
        n_layer=config["num_hidden_layers"],
        n_embd=config["hidden_size"],
        n_head=config["num_heads"],
        head_size=config["head_dim"],
        dim_ffn=config["intermediate_size"],
        vocab_size=config["vocab_size"],
        low_rank={name: config[f"{long}_low_rank_dim"] for name, long in _RANKS.items()},
    )
    found = read_safetensors(path / _WEIGHTS)
    tensors = {}
    for key, shape in parameter_shapes(sizes).items():
        place = _place(key, shape)
        tensors[key] = found[place.name].mT if place.is_swapped else found[place.name].view(shape)
    return tensors


_USE = """\
from rwkv7_hf import RWKV7ForCausalLM
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({out}, trust_remote_code=True)
model = RWKV7ForCausalLM.from_pretrained({out})"""

TARGET = Target(
    "",
    _write,
    _read,
    dtypes=("bf16", "f16", "f32"),
    takes_text=True,
    check_sizes=check_sizes,
    runtime=Runtime("rwkv7-hf", "rwkv7_hf", "hf", log_probs),
    uses={"rwkv7-hf": ("python", _USE)},
)
