"""Where the tensors of BlinkDL's layout stand in a GGUF file, as llama.cpp reads it (src/models/rwkv6.cpp, rwkv7.cpp;
gguf's tensor_mapping.py)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from rwkv_miss.config import ModelConfig
from rwkv_miss.errors import UserError
from rwkv_miss.model.recognise import parameter_shapes

_TOP = {
    "emb.weight": "token_embd.weight",
    "blocks.0.ln0.weight": "token_embd_norm.weight",
    "blocks.0.ln0.bias": "token_embd_norm.bias",
    "ln_out.weight": "output_norm.weight",
    "ln_out.bias": "output_norm.bias",
    "head.weight": "output.weight",
}
_PARTS = {
    **{f"ln1.{kind}": f"attn_norm.{kind}" for kind in ("weight", "bias")},
    **{f"ln2.{kind}": f"attn_norm_2.{kind}" for kind in ("weight", "bias")},
    **{f"att.ln_x.{kind}": f"time_mix_ln.{kind}" for kind in ("weight", "bias")},
    **{f"att.{name}.weight": f"time_mix_{name}.weight" for name in ("receptance", "key", "value", "output", "gate")},
    **{f"ffn.{name}.weight": f"channel_mix_{name}.weight" for name in ("receptance", "key", "value")},
}
_OWN_PARTS = {
    6: {
        "att.time_maa_x": "time_mix_lerp_x.weight",
        "att.time_maa_w1": "time_mix_w1.weight",
        "att.time_maa_w2": "time_mix_w2.weight",
        "att.time_faaaa": "time_mix_first.weight",
        "att.time_decay": "time_mix_decay.weight",
        "att.time_decay_w1": "time_mix_decay_w1.weight",
        "att.time_decay_w2": "time_mix_decay_w2.weight",
        "ffn.time_maa_k": "channel_mix_lerp_k.weight",
        "ffn.time_maa_r": "channel_mix_lerp_r.weight",
    },
    7: {
        **{f"att.{name}": f"time_mix_{name}.weight" for name in ("w0", "a0", "v0", "k_k", "k_a", "r_k")},
        **{f"att.{name}{i}": f"time_mix_{name}{i}.weight" for name in "wavg" for i in (1, 2)},
        "ffn.x_k": "channel_mix_lerp_k.weight",
    },
}
# Stacked in this order as one tensor.
_FUSED = {6: [f"att.time_maa_{x}" for x in "wkvrg"], 7: [f"att.x_{x}" for x in "rwkvag"]}
_FUSED_NAME = "time_mix_lerp_fused.weight"
# Written with the last two dimensions swapped.
_SWAPPED = {
    6: {"att.time_maa_w1", "att.time_maa_w2", "att.time_decay_w1", "att.time_decay_w2"},
    7: {f"att.{name}{i}" for name in "wavg" for i in (1, 2)},
}
# Layer 0 has no use for them, but llama.cpp loads them, in the sizes of a0, a1 and a2: copies of these.
_COPIES = {f"blocks.0.att.v{i}": f"blocks.0.att.a{i}" for i in range(3)}


class Entry(NamedTuple):
    """A tensor of a GGUF file.

    name: its name there; keys: those of the tensors that it is made of, stacked if there are several.
    shape: as torch has it, the reverse of what GGUF says.
    swapped: whether the last two dimensions are swapped.
    """

    name: str
    keys: tuple[str, ...]
    shape: tuple[int, ...]
    swapped: bool = False

    def make(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """From the tensors of BlinkDL's layout, by their keys."""
        stacked = torch.stack([tensors[key] for key in self.keys])
        return (stacked.transpose(-1, -2) if self.swapped else stacked).reshape(self.shape)

    def parts(self, made: Tensor, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
        """The tensors of `keys`, in their shapes, from what `make` returned; views of it where nothing is swapped."""
        found = {}
        for key, part in zip(self.keys, made.reshape(len(self.keys), -1), strict=True):
            *before, rows, columns = (1, *shapes[key])
            if self.swapped:
                part = part.view(*before, columns, rows).transpose(-1, -2).contiguous()
            found[key] = part.view(shapes[key])
        return found


def check_sizes(sizes: ModelConfig) -> None:
    """UserError for a model that llama.cpp does not compute."""
    if sizes.version not in (6, 7):
        raise UserError(f"RWKV-{sizes.version}: llama.cpp has RWKV-6 and RWKV-7 alone; use --to with another format")
    if sizes.version == 7 and sizes.head_size % 32:  # ggml-cpu/ops.cpp, ggml_compute_forward_rwkv_wkv7_f32
        raise UserError(
            f"the model has heads of {sizes.head_size}, but llama.cpp computes RWKV-7 rightly with multiples of 32 "
            "alone; use --to with another format"
        )


def entries(sizes: ModelConfig) -> list[Entry]:
    """All tensors of a model's file but those of `copies`."""
    version = int(sizes.version)
    found, fused = [], _FUSED[version]
    for key, shape in parameter_shapes(sizes).items():
        _, _, rest = key.partition(".")
        layer, _, part = rest.partition(".")
        if part == fused[0]:
            keys = tuple(f"blocks.{layer}.{name}" for name in fused)
            found.append(Entry(f"blk.{layer}.{_FUSED_NAME}", keys, (len(keys), 1, 1, sizes.n_embd)))
        elif key in _TOP or part not in fused:
            swapped = part in _SWAPPED[version]
            if swapped:
                shape = torch.Size((*shape[:-2], shape[-1], shape[-2]))
            elif part == "att.r_k" or shape[:-1].numel() == 1:
                shape = torch.Size((shape.numel(),))
            found.append(Entry(name_of(key, version), (key,), tuple(shape), swapped))
    return found


def copies(sizes: ModelConfig) -> list[Entry]:
    """The tensors that are in a file only because they are loaded."""
    if sizes.version != 7:
        return []
    by_key = {entry.keys[0]: entry for entry in entries(sizes)}
    return [by_key[source]._replace(name=name_of(copy, 7)) for copy, source in _COPIES.items()]


def name_of(key: str, version: int | str) -> str:
    """A tensor's name in GGUF, of one that has a place of its own."""
    if key in _TOP:
        return _TOP[key]
    _, layer, part = key.split(".", 2)
    return f"blk.{layer}.{(_PARTS | _OWN_PARTS[int(version)])[part]}"


def linear_of(name: str) -> str:
    """The path of the linear whose weight has that name in GGUF."""
    _, layer, part = name.split(".", 2)
    [key] = [key for key, named in _PARTS.items() if named == part]
    return f"blocks.{layer}.{key}".removesuffix(".weight")


def is_matrix(key: str) -> bool:
    """Whether a tensor is stored in the file's dtype; others are f32."""
    part = key.split(".", 2)[-1]
    return key in ("emb.weight", "head.weight") or is_low_rank(key) or (part in _PARTS and ".ln" not in f".{part}")


def is_low_rank(key: str) -> bool:
    """Whether a tensor is one of RWKV-7's small matrices, which llama.cpp keeps from being quantised. Those of the
    decay, like RWKV-6's, are f32 always."""
    return key.rpartition(".")[2] in ("a1", "a2", "v1", "v2", "g1", "g2")
