"""RWKV models, loaded from checkpoints."""

from __future__ import annotations

import os

import torch
from torch import nn

from rwkv_miss.checkpoint import fingerprint, infer_config, parse_dtype, read_checkpoint
from rwkv_miss.config import ModelConfig
from rwkv_miss.errors import UserError
from rwkv_miss.model.rwkv7 import RWKV7

__all__ = ["RWKV7", "load_model", "model_class"]

_MODELS = {7: RWKV7}


def model_class(config: ModelConfig, path: str | os.PathLike) -> type[RWKV7]:
    """The model that runs a checkpoint of this version; UserError where there is none yet."""
    if config.version not in _MODELS:
        raise UserError(f"{path}: an RWKV-{config.version} checkpoint; this version runs RWKV-7 only")
    return _MODELS[config.version]


def load_model(
    path: str | os.PathLike,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device = "cpu",
    wkv_backend: str = "auto",
) -> nn.Module:
    """The model in a .pth or .st checkpoint, everything inferred from it.

    Args:
        dtype: of the weights and activations (`bf16`, `fp32` or a torch dtype); None runs a bf16 file as bf16
            and any other as fp32. Weights that need no conversion stay memory-mapped on the CPU.
        wkv_backend: see `rwkv_miss.ops.BACKENDS`.

    Returns:
        The model; `.config` has its sizes, `.fingerprint` says which base it is.

    Raises:
        UserError: the file cannot be read, is no RWKV-7, or its tensors do not fit together.
    """
    tensors = read_checkpoint(path)
    config = infer_config(tensors, path)
    build = model_class(config, path)
    with torch.device("meta"):
        model = build(config, wkv_backend)
    mark = fingerprint(tensors)
    weights = {k: t for k, t in tensors.items() if k not in build.unused}
    _check_shapes({k: p.shape for k, p in model.named_parameters()}, {k: t.shape for k, t in weights.items()}, path)
    dtypes = {t.dtype for t in weights.values()}
    if dtype is None and dtypes != {torch.bfloat16}:
        dtype = torch.float32
    dtype = parse_dtype(dtype or torch.bfloat16)
    if dtype == torch.float16:
        raise UserError("dtype fp16 is for files; the model runs in bf16 or fp32")
    weights = {k: t.to(dtype) for k, t in weights.items()}
    model.load_state_dict(weights, assign=True)
    model.fingerprint = mark
    return model.to(device)


def _check_shapes(wanted: dict[str, torch.Size], found: dict[str, torch.Size], path: str | os.PathLike) -> None:
    problems = [f"{k} is missing" for k in wanted if k not in found]
    problems += [f"{k} is not a part of RWKV-7" for k in found if k not in wanted]
    problems += [
        f"{k} has shape {tuple(found[k])}, expected {tuple(wanted[k])}"
        for k in wanted
        if k in found and wanted[k] != found[k]
    ]
    if problems:
        more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
        raise UserError(f"{path}: the checkpoint does not fit together: {'; '.join(problems[:5])}{more}")
