"""Merging: base + adapter -> one .pth for any RWKV runtime, tensor by tensor, verified before it gets its name."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rwkv_miss.adapters.files import check_fits, load_adapter, read_adapter
from rwkv_miss.adapters.miss import delta_weight
from rwkv_miss.checkpoint import (
    DTYPES,
    TensorSpec,
    atomic_write,
    fingerprint,
    infer_config,
    parse_dtype,
    read_checkpoint,
    write_pth,
)
from rwkv_miss.errors import RunError, UserError
from rwkv_miss.model import MODELS, load_model

# Largest difference of logits, root mean square relative to that of the logits, between the merged file and
# base + adapter. The two round differently, more in the half precisions.
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.1}
_VERIFY_TOKENS = 128
# Elements that are added up at a time.
_PIECE = 2**14


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
    names = MODELS[infer_config(base, base_path).version].linears
    linears = {
        key.removesuffix(".weight"): t.shape
        for key, t in base.items()
        if any(key.endswith(f".{name}.weight") for name in names)
    }
    adapter = read_adapter(adapter_folder)
    check_fits(adapter, linears, fingerprint(base), adapter_folder)

    specs = {name: TensorSpec(t.shape, cast_to or t.dtype) for name, t in base.items()}
    if odd := {str(s.dtype) for s in specs.values() if s.dtype not in DTYPES.values()}:
        raise UserError(f"dtype is {odd.pop()}; a merged model has one of {', '.join(DTYPES)}")
    layers: dict[str, MergedLayer] = {}
    # One buffer for every result: large blocks that come and go leave holes in the heap, which then grows with
    # the number of tensors (glibc).
    nbytes = {name: s.shape.numel() * s.dtype.itemsize for name, s in specs.items()}
    buffer = torch.empty(max(nbytes.values()), dtype=torch.uint8)

    def compute(name: str) -> Tensor:
        out = buffer[: nbytes[name]].view(specs[name].dtype).view(specs[name].shape)
        module = name.removesuffix(".weight")
        if module in adapter.blocks:
            layers[module] = _merge_one(module, base[name], adapter.blocks[module], out)
        else:
            out.copy_(base[name])
        return out

    with atomic_write(out_path) as part:
        write_pth(part, specs, compute)
        if wrong := [name for name, t in read_checkpoint(part).items() if not torch.equal(t, compute(name))]:
            raise RunError(f"{out_path}: {wrong[0]} was read back changed (a faulty disk?); nothing was written")
        error, effect = _verify(base_path, adapter_folder, part)
    written = {str(s.dtype).removeprefix("torch.") for s in specs.values()}
    return MergeReport(out_path, ", ".join(sorted(written)), list(layers.values()), error, effect)


def _merge_one(name: str, W: Tensor, D: Tensor, out: Tensor) -> MergedLayer:
    """Writes W + dW to `out`, some rows at a time."""
    rows = max(1, _PIECE // W.shape[1])
    delta_squares = lost_squares = 0.0
    for W_rows, D_rows, out_rows in zip(W.split(rows), D.float().split(rows, dim=1), out.split(rows), strict=True):
        delta = delta_weight(D_rows, W.shape[1])
        exact = W_rows.float() + delta
        out_rows.copy_(exact)
        delta_squares += delta.square().sum().item()
        lost_squares += (out_rows.float() - exact).square().sum().item()
    loss = math.sqrt(lost_squares / delta_squares) if delta_squares else 0.0
    return MergedLayer(name, math.sqrt(delta_squares), loss)


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
