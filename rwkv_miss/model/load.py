"""Loads models from checkpoints."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from rwkv_miss.checkpoint import parse_dtype, read_checkpoint
from rwkv_miss.errors import UserError
from rwkv_miss.fingerprints import fingerprint
from rwkv_miss.model.base import RWKV
from rwkv_miss.model.initial_state import add_initial_state, file_layout, is_state
from rwkv_miss.model.quantised import quantise, quantised_linears
from rwkv_miss.model.recognise import infer_config
from rwkv_miss.model.versions import MODELS
from rwkv_miss.plain_reads import plain_reads


def load_model(
    path: str | os.PathLike,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device = "cpu",
    wkv_backend: str = "auto",
    quant: str = "none",
    quant_skip: Collection[str] | None = None,
) -> RWKV:
    """Loads the model in a .pth or .st checkpoint; its version and sizes are inferred from the file.

    Args:
        dtype: of the weights and activations (`bf16`, `fp32` or a torch dtype); None runs a bf16 file as bf16
            and any other as fp32. A learned state beside the weights is fp32 in both. Weights that need no
            conversion stay memory-mapped on the CPU.
        wkv_backend: see `rwkv_miss.ops.BACKENDS`.
        quant: int8 or nf4 stores the weights of the linears in 8 or 4 bits (`rwkv_miss.model.quantised`), each as soon
            as it is read, those in `quant_skip` excepted (None: the format's own choice); they cannot be trained then.

    Returns:
        The model; `.config` has its sizes, `.fingerprint` identifies the base.

    Raises:
        UserError: the file cannot be read, its model is none of those in `rwkv_miss.model.versions`, or its tensors do
            not fit together; or bitsandbytes, which quantises, cannot be imported.
    """
    tensors = read_checkpoint(path)
    model = build_model(tensors, path, dtype, device, wkv_backend, quant, quant_skip)
    model.fingerprint = fingerprint(tensors, path)
    return model


def build_model(
    tensors: Mapping[str, Tensor],
    path: str | os.PathLike,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device = "cpu",
    wkv_backend: str = "auto",
    quant: str = "none",
    quant_skip: Collection[str] | None = None,
    as_stored: bool = False,
) -> RWKV:
    """As `load_model`, of a checkpoint that has been read already: `tensors`, from the file `path` (for messages). The
    model's `fingerprint` is left to the caller. With `as_stored` the weights keep their own dtypes, for
    `logits_block_by_block`, which converts them."""
    config = infer_config(tensors, path)
    kind = MODELS[config.version]
    with torch.device("meta"):
        model = kind(config, wkv_backend)
        if any(map(is_state, tensors)):
            add_initial_state(model)
    dtype = running_dtype(tensors, dtype)
    wide = torch.promote_types(dtype, torch.float32)
    quantised = set() if quant == "none" else set(quantised_linears(config, quant, quant_skip))
    with plain_reads(tensors.values()) as reader:  # what is converted is needed no longer
        for path in quantised:
            model.set_submodule(path, quantise(tensors[f"{path}.weight"], quant, dtype, reader.read))
        weights = {
            key: file_layout(t, kind).to(wide)
            if is_state(key)
            else t
            if as_stored or t.dtype == dtype
            else reader.read(t).to(dtype)
            for key, t in tensors.items()
            if key not in kind.unused and key.removesuffix(".weight") not in quantised
        }
    model.load_state_dict(weights, assign=True)
    return model.to(device)


def running_dtype(tensors: Mapping[str, Tensor], dtype: str | torch.dtype | None) -> torch.dtype:
    """The dtype that `load_model` runs a checkpoint in; UserError where it cannot."""
    dtypes = {t.dtype for key, t in tensors.items() if not is_state(key)}
    if dtype is None and dtypes != {torch.bfloat16}:
        dtype = torch.float32
    dtype = parse_dtype(dtype or torch.bfloat16)
    if dtype == torch.float16:
        raise UserError("dtype fp16 is for files; the model runs in bf16 or fp32")
    return dtype
