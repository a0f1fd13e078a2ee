"""Merging: base + adapter -> one .pth for any RWKV runtime, tensor by tensor, verified before it gets its name."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rwkv_miss.adapters.files import check_fits, load_adapter, read_adapter
from rwkv_miss.adapters.miss import delta_weight
from rwkv_miss.checkpoint import (
    TensorSpec,
    atomic_write,
    fingerprint,
    infer_config,
    parse_dtype,
    read_checkpoint,
    write_pth,
)
from rwkv_miss.errors import RunError, UserError
from rwkv_miss.model import load_model, model_class

# Largest difference of logits, root mean square relative to that of the logits, between the merged file and
# base + adapter. The two round differently, more in the half precisions.
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.1}
_VERIFY_TOKENS = 128


@dataclass(frozen=True)
class MergedLayer:
    name: str
    delta_norm: float
    """|| dW ||, Frobenius."""
    cast_loss: float
    """|| cast(W + dW) - (W + dW) || / || dW ||: the share of what was learned that the cast could have changed."""


@dataclass(frozen=True)
class MergeReport:
    out: Path
    dtype: str
    layers: list[MergedLayer]
    logits_error: float
    """Root mean square of (merged - (base + adapter)) logits, relative to that of the logits."""
    logits_effect: float
    """The same of ((base + adapter) - base): what the adapter changes."""


def merge(
    base_path: str | os.PathLike,
    adapter_folder: str | os.PathLike,
    out_path: str | os.PathLike,
    dtype: str | torch.dtype | None = None,
) -> MergeReport:
    """Writes W + dW for every adapted linear and everything else as it is: the base's keys, shapes and order.

    The base is memory-mapped and one tensor is held at a time. Each sum is taken in fp32 and cast once. The file
    is then opened and its logits are compared with those of base + adapter; only then does it get its name.

    Args:
        dtype: of every tensor written (`bf16`, `fp16`, `fp32`); None keeps each tensor's own.

    Raises:
        UserError: the adapter was made for another base, does not fit, or a file cannot be read or written.
        RunError: the written file does not compute what base + adapter computes.
    """
    base_path, out_path = Path(base_path), Path(out_path)
    if out_path.suffix != ".pth":
        raise UserError(f"{out_path}: the merged model is written as .pth; give a name that ends so")
    if out_path.is_dir():
        raise UserError(f"{out_path}: is a folder; give the name of the file to write")
    if out_path.exists() and base_path.exists() and out_path.samefile(base_path):
        raise UserError(f"{out_path}: is the base itself; give another name for the merged model")
    cast_to = None if dtype is None else parse_dtype(dtype)
    base = read_checkpoint(base_path)
    names = model_class(infer_config(base, base_path), base_path).linears
    linears = {
        key.removesuffix(".weight"): t.shape
        for key, t in base.items()
        if any(key.endswith(f".{name}.weight") for name in names)
    }
    adapter = read_adapter(adapter_folder)
    check_fits(adapter, linears, fingerprint(base), adapter_folder)

    specs = {name: TensorSpec(t.shape, cast_to or t.dtype) for name, t in base.items()}
    layers: list[MergedLayer] = []

    def compute(name: str) -> Tensor:
        module = name.removesuffix(".weight")
        if module not in adapter.blocks:
            return base[name].to(specs[name].dtype)
        merged, layer = _merge_one(module, base[name], adapter.blocks[module], specs[name].dtype)
        layers.append(layer)
        return merged

    with atomic_write(out_path) as part:
        write_pth(part, specs, compute)
        error, effect = _verify(base_path, adapter_folder, part)
    written = {str(s.dtype).removeprefix("torch.") for s in specs.values()}
    return MergeReport(out_path, ", ".join(sorted(written)), layers, error, effect)


def _merge_one(name: str, W: Tensor, D: Tensor, dtype: torch.dtype) -> tuple[Tensor, MergedLayer]:
    delta = delta_weight(D.float(), W.shape[1])
    exact = W.float() + delta
    cast = exact.to(dtype)
    norm = delta.norm().item()
    loss = (cast.float() - exact).norm().item() / norm if norm else 0.0
    return cast, MergedLayer(name, norm, loss)


@torch.no_grad()
def _verify(base_path: Path, adapter_folder: str | os.PathLike, merged_path: Path) -> tuple[float, float]:
    """(logits_error, logits_effect) of `MergeReport`; RunError where the error is more than rounding."""
    model = load_model(base_path).eval()
    vocab_size = model.config.vocab_size
    tokens = torch.randint(vocab_size, (1, _VERIFY_TOKENS), generator=torch.Generator().manual_seed(0))
    base_logits = model(tokens)[0].float()
    adapted = load_adapter(model, adapter_folder)(tokens)[0].float()
    merged_model = load_model(merged_path).eval()
    merged = merged_model(tokens)[0].float()
    scale = adapted.square().mean().sqrt()
    error = ((merged - adapted).square().mean().sqrt() / scale).item()
    effect = ((adapted - base_logits).square().mean().sqrt() / scale).item()
    # The coarser of the two files' dtypes says how far rounding may carry them apart.
    stored = {t.dtype for path in (base_path, merged_path) for t in read_checkpoint(path).values()}
    tolerance = max(_TOLERANCE[d] for d in stored)
    if not error <= tolerance:  # also when it is not a number
        raise RunError(
            f"the merged file's logits differ from base + adapter by {error:.1e} of their size, more than rounding "
            f"({tolerance:.0e}); nothing was written"
        )
    return error, effect
