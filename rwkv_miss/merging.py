"""Merging: base + adapter -> one .pth for any RWKV runtime, or its learned state alone, tensor by tensor, verified
before it gets its name."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rwkv_miss.adapters.files import check_fits, load_adapter, read_adapter
from rwkv_miss.adapters.miss import delta_weight
from rwkv_miss.checkpoint import (
    DTYPES,
    TensorSpec,
    fingerprint,
    infer_config,
    parse_dtype,
    read_checkpoint,
    write_pth,
)
from rwkv_miss.errors import RunError, UserError
from rwkv_miss.files import atomic_write
from rwkv_miss.model import load_model
from rwkv_miss.model.initial_state import is_state, load_initial_state, state_shapes, swap_layout

_log = logging.getLogger("rwkv_miss")

# Largest difference of logits, root mean square relative to that of the logits, between the merged file and
# base + adapter. The two round differently, more in the half precisions.
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.1}
_VERIFY_TOKENS = 128
# Elements that are added up at a time.
_PIECE = 2**14


@dataclass(frozen=True)
class MergedLayer:
    name: str
    """A linear's path, or the key of a tensor that was trained itself."""
    delta_norm: float
    """|| dW ||, Frobenius: what was added, or trained minus base."""
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
    state_only: bool = False,
) -> MergeReport:
    """Writes W + dW for every adapted linear, the tensors that were trained themselves, and everything else as it is:
    the base's keys, shapes and order. A learned state that the base has not comes last, in the layout of state files.

    The base is memory-mapped and one tensor is held at a time. Each sum is taken in fp32 and cast once. The file
    is then opened and its logits are compared with those of base + adapter; only then does it get its name.

    Args:
        dtype: of every tensor written (`bf16`, `fp16`, `fp32`); None keeps each tensor's own. States are fp32.
        state_only: write the learned state and nothing else: a state file, which is loaded beside the base.

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
    config = infer_config(base, base_path)
    adapter = read_adapter(adapter_folder)
    check_fits(adapter, config, {key: t.shape for key, t in base.items()}, fingerprint(base), adapter_folder)
    states = {key: shape for key, shape in state_shapes(config).items() if key in adapter.tensors}
    if state_only and not states:
        raise UserError(f"{adapter_folder}: the adapter has no learned state; leave state_only out")
    if state_only and dtype is not None:
        raise UserError(f"dtype is {dtype}, but a state is written in fp32; leave dtype out")
    if states and not state_only and config.version == 7:
        _log.warning(
            "RWKV-7 runtimes do not look for a state in the model's file: write it to a file of its own too, with "
            "--state_only, and load that as their state"
        )

    shapes = states if state_only else {key: t.shape for key, t in base.items()} | states
    specs = {
        name: TensorSpec(shape, torch.float32 if is_state(name) else cast_to or base[name].dtype)
        for name, shape in shapes.items()
    }
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
            layers[module] = _merge_one(module, _sums(base[name], adapter.blocks[module]), out)
        elif name in adapter.tensors:
            trained = swap_layout(adapter.tensors[name], config.version) if is_state(name) else adapter.tensors[name]
            W = base.get(name, torch.zeros(()).expand(trained.shape))
            layers[name] = _merge_one(name, _replacements(W, trained), out)
        else:
            out.copy_(base[name])
        return out

    with atomic_write(out_path) as part:
        write_pth(part, specs, compute)
        if wrong := [name for name, t in read_checkpoint(part).items() if not torch.equal(t, compute(name))]:
            raise RunError(f"{out_path}: {wrong[0]} was read back changed (a faulty disk?); nothing was written")
        error, effect = _verify(base_path, adapter_folder, part, state_only)
    written = {str(s.dtype).removeprefix("torch.") for s in specs.values()}
    return MergeReport(out_path, ", ".join(sorted(written)), list(layers.values()), error, effect)


def _rows(x: Tensor) -> tuple[Tensor, ...]:
    """A tensor of any shape as pieces of a few rows."""
    x = x.reshape(-1, x.shape[-1])
    return x.split(max(1, _PIECE // x.shape[1]))


def _sums(W: Tensor, D: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
    """(dW, W + dW) of each piece of W's rows."""
    pieces = _rows(W)
    for W_rows, D_rows in zip(pieces, D.float().split(len(pieces[0]), dim=1), strict=True):
        delta = delta_weight(D_rows, W.shape[1])
        yield delta, W_rows.float() + delta


def _replacements(W: Tensor, trained: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
    for W_rows, trained_rows in zip(_rows(W), _rows(trained), strict=True):
        exact = trained_rows.float()
        yield exact - W_rows.float(), exact


def _merge_one(name: str, pieces: Iterable[tuple[Tensor, Tensor]], out: Tensor) -> MergedLayer:
    """Writes the second of each pair to `out`."""
    delta_squares = lost_squares = 0.0
    for (delta, exact), out_rows in zip(pieces, _rows(out), strict=True):
        out_rows.copy_(exact)
        delta_squares += delta.square().sum().item()
        lost_squares += (out_rows.float() - exact).square().sum().item()
    loss = math.sqrt(lost_squares / delta_squares) if delta_squares else 0.0
    return MergedLayer(name, math.sqrt(delta_squares), loss)


@torch.no_grad()
def _verify(base_path: Path, adapter_folder: str | os.PathLike, written: Path, state_only: bool) -> tuple[float, float]:
    """(logits_error, logits_effect) of `MergeReport`; RunError where the error is more than rounding."""
    model = load_model(base_path).eval()
    vocab_size = model.config.vocab_size
    tokens = torch.randint(vocab_size, (1, _VERIFY_TOKENS), generator=torch.Generator().manual_seed(0))
    base_logits = model(tokens)[0].float()
    adapted = load_adapter(model, adapter_folder)(tokens)[0].float()
    if state_only:  # in the place of the adapter's own: the same numbers
        for block in model.blocks:
            block.att.time_state = None
        load_initial_state(model, written)
        merged, tolerance = model(tokens)[0].float(), 0.0
    else:
        merged = load_model(written).eval()(tokens)[0].float()
        # The coarser of the two files' dtypes says how far rounding may carry them apart.
        tolerance = max(_TOLERANCE[t.dtype] for path in (base_path, written) for t in read_checkpoint(path).values())
    scale = adapted.square().mean().sqrt()
    error = ((merged - adapted).square().mean().sqrt() / scale).item()
    effect = ((adapted - base_logits).square().mean().sqrt() / scale).item()
    if not error <= tolerance:  # also when it is not a number
        raise RunError(
            f"the written file's logits differ from base + adapter by {error:.1e} of their size, more than rounding "
            f"({tolerance:.0e}); nothing was written"
        )
    return error, effect
