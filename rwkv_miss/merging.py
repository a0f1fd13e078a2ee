"""Merging: writes base + adapter as one file for any RWKV runtime, or the adapter's learned state alone. The file is
written tensor by tensor, and verified before it gets its name."""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rwkv_miss.adapters.files import AdapterFile, check_fits, load_adapter, read_adapter
from rwkv_miss.adapters.plan import Plan
from rwkv_miss.checkpoint import DTYPES, TensorSpec, fingerprint, parse_dtype, read_checkpoint
from rwkv_miss.errors import RunError, UserError
from rwkv_miss.export.table import target_of
from rwkv_miss.export.target import Target, Weights
from rwkv_miss.files import atomic_write
from rwkv_miss.model.initial_state import file_layout, is_state, load_initial_state, state_shapes
from rwkv_miss.model.load import build_model, load_model
from rwkv_miss.model.recognise import infer_config
from rwkv_miss.model.versions import MODELS
from rwkv_miss.progress import Report

_log = logging.getLogger("rwkv_miss")

# The largest difference allowed between the logits of the merged file and of base + adapter: its root mean square
# relative to that of the logits. The two round differently, more so in bf16 and fp16.
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.1}
_VERIFY_TOKENS = 128
# Elements of a weight that are handled in fp32 at a time.
_PIECE = 2**14


@dataclass(frozen=True)
class MergedLayer:
    """What merging did to one tensor.

    name: a linear's path, or the key of a tensor that was trained directly.
    delta_norm: || dW ||, the Frobenius norm of what was added, or of trained minus base.
    cast_loss: || cast(W + dW) - (W + dW) || / || dW ||: the share of what was learned that the cast to the file's dtype
        could have changed.
    """

    name: str
    delta_norm: float
    cast_loss: float


@dataclass(frozen=True)
class MergeReport:
    """What was written.

    dtype: the names of the dtypes in the file, such as "bfloat16, float32".
    logits_error: the root mean square of the logits' difference, merged - (base + adapter), relative to that of the
        logits of base + adapter.
    logits_effect: the same for (base + adapter) - base: how much the adapter changes the logits.
    """

    out: Path
    dtype: str
    layers: list[MergedLayer]
    logits_error: float
    logits_effect: float

    def kinds(self) -> dict[str, list[MergedLayer]]:
        """The layers, grouped by their names without the block's number: all `att.key` together, and so on."""
        found: dict[str, list[MergedLayer]] = {}
        for layer in self.layers:
            found.setdefault(re.sub(r"^blocks\.\d+\.", "", layer.name), []).append(layer)
        return found


def merge(
    base_path: str | os.PathLike,
    adapter_folder: str | os.PathLike,
    out_path: str | os.PathLike,
    dtype: str | torch.dtype | None = None,
    state_only: bool = False,
    overwrite: bool = False,
    on_tensor: Report | None = None,
) -> MergeReport:
    """Writes W + dW for every adapted linear, the tensors that were trained directly, and the rest as it is, with
    the base's keys, shapes and order. A learned state that the base lacks comes last, in the layout of state files.

    The base is memory-mapped and one tensor is held at a time. Each sum is taken in fp32 and cast once. The file
    is then opened and its logits are compared with those of base + adapter; only then does it get its name.

    Args:
        dtype: of every tensor written (`bf16`, `fp16`, `fp32`); None keeps each tensor's own. States are always fp32.
        state_only: write the learned state and nothing else: a state file, which is loaded beside the base.
        overwrite: replace `out_path` if it is there.
        on_tensor: called with (tensors done, tensors in all) after each tensor that is written, and again for each that
            is read back.

    Raises:
        UserError: the adapter was made for another base, does not fit, or a file cannot be read or written.
        RunError: the written file does not compute what base + adapter computes.
    """
    base_path, out_path = Path(base_path), Path(out_path)
    target = target_of(out_path)
    _check_out(out_path, base_path, overwrite)
    cast_to = None if dtype is None else parse_dtype(dtype)
    base = read_checkpoint(base_path)
    sizes = infer_config(base, base_path)
    kind = MODELS[sizes.version]
    adapter = read_adapter(adapter_folder)
    plan = check_fits(adapter, sizes, {key: t.shape for key, t in base.items()}, fingerprint(base), adapter_folder)
    states = {key: shape for key, shape in state_shapes(sizes).items() if key in plan.whole}
    if state_only and not states:
        raise UserError(f"{adapter_folder}: the adapter has no learned state; leave state_only out")
    if state_only and dtype is not None:
        raise UserError(f"dtype is {dtype}, but a state is written in fp32; leave dtype out")
    if states and not state_only and not kind.runtimes_find_state:
        _log.warning(
            "RWKV-%s runtimes do not look for a state in the model's file: write it to a file of its own too, with "
            "--state_only, and load that as their state",
            sizes.version,
        )

    shapes = states if state_only else {key: t.shape for key, t in base.items()} | states
    specs = {
        name: TensorSpec(shape, torch.float32 if is_state(name) else cast_to or base[name].dtype)
        for name, shape in shapes.items()
    }
    if odd := {str(s.dtype) for s in specs.values() if s.dtype not in DTYPES.values()}:
        raise UserError(f"dtype is {odd.pop()}; a merged model has one of {', '.join(DTYPES)}")
    layers: dict[str, MergedLayer] = {}
    total, done = 2 * len(specs), 0
    # One buffer for every result: large blocks that come and go leave holes in the heap, which then grows with
    # the number of tensors (glibc).
    buffer = torch.empty(max(s.shape.numel() * s.dtype.itemsize for s in specs.values()), dtype=torch.uint8)

    def compute(name: str) -> Tensor:
        nonlocal done
        spec = specs[name]
        out = buffer[: spec.shape.numel() * spec.dtype.itemsize].view(spec.dtype).view(spec.shape)
        path = name.removesuffix(".weight")
        if path in plan.linears:
            layers[path] = _write_rows(path, _sums(base[name], path, plan, adapter), out)
        elif name in plan.whole:
            trained = adapter.tensors[name]
            trained = file_layout(trained, kind) if is_state(name) else trained
            W = base.get(name, torch.zeros(()).expand(trained.shape))
            layers[name] = _write_rows(name, _replacements(W, trained), out)
        else:
            out.copy_(base[name])
        if spec.dtype == torch.float16 and not torch.isfinite(out).all():
            largest = torch.finfo(torch.float16).max
            raise UserError(f"{name}: not finite in fp16, whose largest value is {largest:,.0f}; give --dtype bf16")
        done += 1
        if on_tensor:
            on_tensor(done, total)
        return out

    with atomic_write(out_path) as part:
        target.write(part, Weights(sizes, specs, compute))
        written = target.read(part)
        if wrong := [name for name, t in written.items() if not _same_bits(t, compute(name))]:
            raise RunError(f"{out_path}: {wrong[0]} was read back changed (a faulty disk?); nothing was written")
        error, effect = _verify(base_path, adapter_folder, written, part, target, state_only)
    names = {str(s.dtype).removeprefix("torch.") for s in specs.values()}
    return MergeReport(out_path, ", ".join(sorted(names)), list(layers.values()), error, effect)


def _check_out(out: Path, base: Path, overwrite: bool) -> None:
    """UserError where `out` may not be written."""
    if out.is_dir():
        raise UserError(f"{out}: is a folder; give the name of the file to write")
    if not out.exists():
        return
    if base.exists() and out.samefile(base):
        raise UserError(f"{out}: is the base itself; give another name for the merged model")
    if not overwrite:
        raise UserError(f"{out}: exists already; give another name, or --overwrite true to replace it")


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal in shape, dtype and every bit, NaNs included."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))


def _rows(x: Tensor) -> tuple[Tensor, ...]:
    """A tensor of any shape as pieces of a few rows."""
    x = x.reshape(-1, x.shape[-1])
    return x.split(max(1, _PIECE // x.shape[1]))


def _sums(W: Tensor, path: str, plan: Plan, adapter: AdapterFile) -> Iterable[tuple[Tensor, Tensor]]:
    """(dW, W + dW) of each piece of the rows of a linear's weight."""
    method = plan.linears[path]
    tensors = {name: adapter.tensors[f"{path}.{name}"] for name in method.names}
    start = 0
    for rows in _rows(W):
        wide = rows.float()
        delta = method.delta(wide, start, tensors, adapter.config)
        start += len(rows)
        yield delta, wide + delta


def _replacements(W: Tensor, trained: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
    """(trained - W, trained) of each piece of the rows of a tensor that was trained directly."""
    for W_rows, trained_rows in zip(_rows(W), _rows(trained), strict=True):
        exact = trained_rows.float()
        yield exact - W_rows.float(), exact


def _write_rows(name: str, pieces: Iterable[tuple[Tensor, Tensor]], out: Tensor) -> MergedLayer:
    """Writes the second tensor of each pair to `out`; the first is its difference from the base."""
    delta_squares = lost_squares = 0.0
    for (delta, exact), out_rows in zip(pieces, _rows(out), strict=True):
        out_rows.copy_(exact)
        delta_squares += delta.square().sum().item()
        lost_squares += (out_rows.float() - exact).square().sum().item()
    loss = math.sqrt(lost_squares / delta_squares) if delta_squares else 0.0
    return MergedLayer(name, math.sqrt(delta_squares), loss)


@torch.no_grad()
def _verify(
    base_path: Path,
    adapter_folder: str | os.PathLike,
    written: Mapping[str, Tensor],
    part: Path,
    target: Target,
    state_only: bool,
) -> tuple[float, float]:
    """(logits_error, logits_effect) of `MergeReport`; RunError where the error is more than rounding."""
    model = load_model(base_path).eval()
    vocab_size = model.config.vocab_size
    tokens = torch.randint(vocab_size, (1, _VERIFY_TOKENS), generator=torch.Generator().manual_seed(0))
    base_logits = model(tokens)[0].float()
    adapted = load_adapter(model, adapter_folder)(tokens)[0].float()
    if state_only:  # the file's state in place of the adapter's: the numbers must be the same
        for time_mix in model.time_mixes():
            time_mix.time_state = None
        load_initial_state(model, part)
        merged, tolerance = model(tokens)[0].float(), 0.0
    else:
        merged = build_model(written, part).eval()(tokens)[0].float()
        # The coarser of the two files' dtypes says how far rounding may carry them apart.
        tolerance = max(_TOLERANCE[t.dtype] for file in (read_checkpoint(base_path), written) for t in file.values())
    for logits, what in ((base_logits, "the base"), (adapted, "base + adapter"), (merged, "the written file")):
        if not torch.isfinite(logits).all():
            raise RunError(f"the logits of {what} are not finite; its weights are damaged; nothing was written")
    scale = adapted.square().mean().sqrt()
    error = ((merged - adapted).square().mean().sqrt() / scale).item()
    effect = ((adapted - base_logits).square().mean().sqrt() / scale).item()
    if not error <= tolerance:  # also if it is NaN, as for logits that are all zero
        raise RunError(
            f"the written file's logits differ from base + adapter by {error:.1e} of their size, more than rounding "
            f"({tolerance:.0e}); nothing was written"
        )
    return error, effect
