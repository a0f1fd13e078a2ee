"""RWKV models, loaded from checkpoints."""

from __future__ import annotations

import os

import torch

from rwkv_miss.checkpoint import fingerprint, infer_config, parse_dtype, read_checkpoint
from rwkv_miss.errors import UserError
from rwkv_miss.model.initial_state import add_initial_state, is_state, swap_layout
from rwkv_miss.model.rwkv import RWKV
from rwkv_miss.model.rwkv6 import RWKV6
from rwkv_miss.model.rwkv7 import RWKV7

__all__ = ["MODELS", "RWKV6", "RWKV7", "load_model"]

MODELS: dict[int, type[RWKV]] = {6: RWKV6, 7: RWKV7}
"""The model of each version that a checkpoint may be of."""


def load_model(
    path: str | os.PathLike,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device = "cpu",
    wkv_backend: str = "auto",
) -> RWKV:
    """The model in a .pth or .st checkpoint, everything inferred from it.

    Args:
        dtype: of the weights and activations (`bf16`, `fp32` or a torch dtype); None runs a bf16 file as bf16
            and any other as fp32. A learned state beside the weights is fp32 in both. Weights that need no
            conversion stay memory-mapped on the CPU.
        wkv_backend: see `rwkv_miss.ops.BACKENDS`.

    Returns:
        The model; `.config` has its sizes, `.fingerprint` says which base it is.

    Raises:
        UserError: the file cannot be read, is no RWKV-6 or RWKV-7, or its tensors do not fit together.
    """
    tensors = read_checkpoint(path)
    config = infer_config(tensors, path)
    build = MODELS[config.version]
    with torch.device("meta"):
        model = build(config, wkv_backend)
        if any(map(is_state, tensors)):
            add_initial_state(model)
    mark = fingerprint(tensors)
    weights = {k: t for k, t in tensors.items() if k not in build.unused}
    wanted = {k: p.shape for k, p in model.named_parameters()}
    _check_shapes(config.version, wanted, {k: t.shape for k, t in weights.items()}, path)
    dtypes = {t.dtype for k, t in weights.items() if not is_state(k)}
    if dtype is None and dtypes != {torch.bfloat16}:
        dtype = torch.float32
    dtype = parse_dtype(dtype or torch.bfloat16)
    if dtype == torch.float16:
        raise UserError("dtype fp16 is for files; the model runs in bf16 or fp32")
    wide = torch.promote_types(dtype, torch.float32)
    weights = {k: swap_layout(t, config.version).to(wide) if is_state(k) else t.to(dtype) for k, t in weights.items()}
    model.load_state_dict(weights, assign=True)
    model.fingerprint = mark
    return model.to(device)


def _check_shapes(
    version: int, wanted: dict[str, torch.Size], found: dict[str, torch.Size], path: str | os.PathLike
) -> None:
    problems = [f"{k} is missing" for k in wanted if k not in found]
    problems += [f"{k} is not a part of RWKV-{version}" for k in found if k not in wanted]
    problems += [
        f"{k} has shape {tuple(found[k])}, expected {tuple(wanted[k])}"
        for k in wanted
        if k in found and wanted[k] != found[k]
    ]
    if problems:
        more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
        raise UserError(f"{path}: the checkpoint does not fit together: {'; '.join(problems[:5])}{more}")
