"""Merging: writes base + adapter as one file for any RWKV runtime, or the adapter's learned state alone. The file is
written tensor by tensor, and verified before it gets its name."""

from __future__ import annotations

import logging
import math
import os
import re
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rwkv_miss.adapters.files import AdapterFile, check_fits, load_adapter, read_adapter
from rwkv_miss.adapters.plan import Plan
from rwkv_miss.adapters.several import set_adapter
from rwkv_miss.ahead import computed_ahead
from rwkv_miss.checkpoint import DTYPES, TensorSpec, parse_dtype, read_checkpoint
from rwkv_miss.config import ModelConfig, Rounding
from rwkv_miss.errors import RunError, UserError
from rwkv_miss.export.table import target_of
from rwkv_miss.export.target import Target, Weights
from rwkv_miss.files import atomic_write, flush
from rwkv_miss.fingerprints import fingerprint
from rwkv_miss.model.base import RWKV
from rwkv_miss.model.block_by_block import logits_block_by_block
from rwkv_miss.model.initial_state import file_layout, is_state, load_initial_state, state_shapes
from rwkv_miss.model.load import build_model
from rwkv_miss.model.recognise import infer_config
from rwkv_miss.model.versions import MODELS
from rwkv_miss.plain_reads import Reader, plain_reads
from rwkv_miss.progress import Report
from rwkv_miss.rounding import round_into

_log = logging.getLogger("rwkv_miss")

# The largest difference allowed between the logits of the merged file and of base + adapter: its root mean square
# relative to that of the logits. The two round differently, more so in bf16 and fp16.
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.1}
_VERIFY_TOKENS = 32
# Elements of a weight that are handled in fp32 at a time: as many as PyTorch leaves to one thread. Several threads that
# share so little wait for each other longer than they work, beside other busy processes many times as long.
_PIECE = 2**15


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
    divergence: KL(base + adapter || merged), the mean over the tokens of the check, in nats.
    divergence_effect: KL(base + adapter || base), the same.
    """

    out: Path
    dtype: str
    layers: list[MergedLayer]
    logits_error: float
    logits_effect: float
    divergence: float
    divergence_effect: float

    def dropped(self, share: float) -> list[MergedLayer]:
        """The layers of which the cast dropped more than this share of the update, the worst first."""
        found = [layer for layer in self.layers if layer.cast_loss > share]
        return sorted(found, key=lambda layer: layer.cast_loss, reverse=True)

    def kinds(self) -> dict[str, list[MergedLayer]]:
        """The layers, grouped by their names without the block's number: all `att.key` together, and so on."""
        found: dict[str, list[MergedLayer]] = {}
        for layer in self.layers:
            found.setdefault(re.sub(r"^blocks\.\d+\.", "", layer.name), []).append(layer)
        return found


class _Part(NamedTuple):
    """One of the adapters that are merged, what it trained, and its weight."""

    adapter: AdapterFile
    plan: Plan
    weight: float


_Change = Callable[[Tensor, int], Tensor]
"""Some rows of a tensor (M, in), in fp32, and the first one's number -> what is added to them, in memory of its own."""


def merge(
    base_path: str | os.PathLike,
    adapter_folder: str | os.PathLike | Sequence[str | os.PathLike],
    out_path: str | os.PathLike,
    dtype: str | torch.dtype | None = None,
    state_only: bool = False,
    overwrite: bool = False,
    on_tensor: Report | None = None,
    weights: Sequence[float] | None = None,
    rounding: Rounding = "nearest",
    tokens: Sequence[int] | None = None,
) -> MergeReport:
    """Writes W + dW for every adapted linear, the tensors that were trained directly, and the rest as it is, with
    the base's keys, shapes and order. Of several adapters, or one with a weight, it writes W + sum of w_i dW_i, where a
    tensor that was trained directly counts as its difference from the base's. A learned state that the base lacks comes
    last, in the layout of state files.

    The files are read in pieces and one tensor is held at a time, in the check one block. Each sum is taken in fp32 and
    cast once. What was written is read back, and its logits are compared with those of base + adapter; only then does
    the file get its name.

    Args:
        adapter_folder: the folder of an adapter or of a run, or several.
        weights: the adapters' weights, in the same order; 1 for each when not given.
        dtype: of every tensor written (`bf16`, `fp16`, `fp32`); None keeps each tensor's own. States are always fp32.
        state_only: write the learned state and nothing else: a state file, which is loaded beside the base.
        overwrite: replace `out_path` if it is there.
        on_tensor: called with (tensors done, tensors in all) after each tensor that is written, and again for each that
            is read back.
        rounding: of what is merged into bf16 weights: see `rwkv_miss.rounding`.
        tokens: the text on which the check compares logits, without ids beyond the vocabulary; random tokens when not
            given.

    Raises:
        UserError: the adapter was made for another base, does not fit, or a file cannot be read or written; or the base
            or what is written has values that are not finite.
        RunError: the written file does not compute what base + adapter computes.
    """
    base_path, out_path = Path(base_path), Path(out_path)
    target = target_of(out_path)
    _check_out(out_path, base_path, overwrite)
    cast_to = None if dtype is None else parse_dtype(dtype)
    base = read_checkpoint(base_path)
    sizes = infer_config(base, base_path)
    kind = MODELS[sizes.version]
    folders = [adapter_folder] if isinstance(adapter_folder, str | os.PathLike) else list(adapter_folder)
    mark = fingerprint(base, base_path)
    parts = _read_parts(folders, weights, sizes, base, mark)
    states = {key: shape for key, shape in state_shapes(sizes).items() if any(key in p.plan.whole for p in parts)}
    if state_only and not states:
        raise UserError(f"{', '.join(map(str, folders))}: the adapter has no learned state; leave state_only out")
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
    changed = {key for p in parts for key in (*p.plan.whole, *(f"{path}.weight" for path in p.plan.linears))}
    if rounding != "nearest" and not any(specs[key].dtype == torch.bfloat16 for key in changed & specs.keys()):
        raise UserError(f"rounding is {rounding}, which is for bf16, but nothing is merged into bf16 weights")
    tokens = [i for i in tokens or () if i < sizes.vocab_size]
    tokens = tokens or torch.randint(sizes.vocab_size, (_VERIFY_TOKENS,), generator=_rng("")).tolist()
    done = 0

    def count() -> None:
        nonlocal done
        done += 1
        if on_tensor:
            on_tensor(done, 2 * len(specs))

    with atomic_write(out_path) as part:
        layers, checksums = _write(part, target, sizes, specs, base, base_path, parts, rounding, count)
        scales = [p.weight for p in parts]
        del parts  # the check reads them again
        with ThreadPoolExecutor(2) as threads:
            # While the file is read back it goes to the disk, and what it is to compute is found.
            flushed = threads.submit(flush, part)
            expected = threads.submit(_expected_logits, base, base_path, mark, folders, scales, tokens)
            written = _read_back(part, target, specs, checksums, count)
            if state_only:
                merged, tolerance = _with_state(base, base_path, mark, folders, scales, part), 0.0
            else:
                merged = build_model(written, part).eval().requires_grad_(False)
                # The coarser of the two files' dtypes says how far rounding may carry them apart.
                tolerance = max(_TOLERANCE[t.dtype] for file in (base, written) for t in file.values())
            with plain_reads([*base.values(), *written.values()]) as reader:
                found = _logits(merged, tokens, reader)
            figures = _compare(*expected.result(), found, tolerance)
            flushed.result()
    names = {str(s.dtype).removeprefix("torch.") for s in specs.values()}
    return MergeReport(out_path, ", ".join(sorted(names)), layers, *figures)


def _read_parts(
    folders: Sequence[str | os.PathLike],
    weights: Sequence[float] | None,
    sizes: ModelConfig,
    base: Mapping[str, Tensor],
    mark: str,
) -> list[_Part]:
    weights = [1.0] * len(folders) if weights is None else weights
    if not folders or len(weights) != len(folders) or not all(map(math.isfinite, weights)):
        raise UserError(f"weights are {list(weights)} for {len(folders)} adapters; give each adapter one number")
    shapes = {key: t.shape for key, t in base.items()}
    adapters = [(read_adapter(folder), folder) for folder in folders]
    plans = [check_fits(adapter, sizes, shapes, mark, folder) for adapter, folder in adapters]
    return [_Part(adapter, plan, w) for (adapter, _), plan, w in zip(adapters, plans, weights, strict=True)]


def _with_adapters(model: RWKV, folders: Sequence[str | os.PathLike], weights: Sequence[float]) -> RWKV:
    """The model with these adapters at once."""
    for i, folder in enumerate(folders):
        load_adapter(model, folder, str(i))
    return model if list(weights) == [1] else set_adapter(model, {str(i): w for i, w in enumerate(weights)})


def _write(
    part: Path,
    target: Target,
    sizes: ModelConfig,
    specs: Mapping[str, TensorSpec],
    base: Mapping[str, Tensor],
    base_path: Path,
    parts: Sequence[_Part],
    rounding: Rounding,
    count: Callable[[], None],
) -> tuple[list[MergedLayer], dict[str, int]]:
    """Writes the merged tensors to `part`. Returns what merging did, and each tensor's checksum."""
    kind = MODELS[sizes.version]
    layers: dict[str, MergedLayer] = {}
    checksums: dict[str, int] = {}

    def compute(name: str, memory: Tensor) -> Tensor:
        spec = specs[name]
        out = memory.view(spec.dtype).view(spec.shape)
        path = name.removesuffix(".weight")
        if mine := [p for p in parts if path in p.plan.linears or name in p.plan.whole]:
            label = path if any(path in p.plan.linears for p in mine) else name
            W = base.get(name, torch.zeros(()).expand(spec.shape))
            layers[name], is_finite = _write_rows(label, _pieces(W, name, mine, kind, reader), out, rounding)
        else:
            if spec.dtype == base[name].dtype:
                reader.read(base[name], out)
            else:
                for rows, out_rows in zip(_rows(base[name]), _rows(out), strict=True):
                    out_rows.copy_(reader.read(rows))
            is_finite = _is_finite(out)
        if not is_finite:
            if name in base and not _is_finite(base[name]):
                raise UserError(f"{base_path}: {name} has values that are not finite; give a base that is sound")
            [dtype] = [short for short, dtype in DTYPES.items() if dtype == spec.dtype]
            wider = "bf16" if dtype == "fp16" else "fp32"
            largest = torch.finfo(spec.dtype).max
            raise UserError(f"{name}: not finite in {dtype}, whose largest value is {largest:,g}; give --dtype {wider}")
        return out

    def written_next(name: str) -> Tensor:
        tensor = computed(name)
        checksums[name] = _checksum(tensor, reader)  # here, since it is the thread that has more time
        count()
        return tensor

    sizes_in_bytes = {name: s.shape.numel() * s.dtype.itemsize for name, s in specs.items()}
    with plain_reads(base.values()) as reader, computed_ahead(sizes_in_bytes, compute) as computed:
        target.write(part, Weights(sizes, specs, written_next))
    return [layers[name] for name in specs if name in layers], checksums


def _read_back(
    part: Path, target: Target, specs: Mapping[str, TensorSpec], checksums: Mapping[str, int], count: Callable[[], None]
) -> Mapping[str, Tensor]:
    """The tensors in the file `part`, after a look at every byte."""
    written = target.read(part)
    with plain_reads(written.values()) as reader, ThreadPoolExecutor(max(2, torch.get_num_threads())) as threads:
        found = threads.map(lambda tensor: _checksum(tensor, reader), written.values())
        for (name, tensor), checksum in zip(written.items(), found, strict=True):
            if (tensor.shape, tensor.dtype, checksum) != (specs[name].shape, specs[name].dtype, checksums[name]):
                raise RunError(f"{name} was read back changed (a faulty disk?); nothing was written")
            count()
    return written


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


def _checksum(tensor: Tensor, reader: Reader) -> int:
    """The CRC-32 of a tensor's bytes."""
    found = 0
    for piece in tensor.contiguous().view(-1).view(torch.uint8).split(2**20):
        found = zlib.crc32(reader.read(piece).numpy().data, found)
    return found


def _is_finite(tensor: Tensor) -> bool:
    """Without a temporary tensor of its size, which `torch.isfinite` needs."""
    return all(bool(torch.isfinite(x)) for x in tensor.aminmax())


def _rows(x: Tensor) -> tuple[Tensor, ...]:
    """A tensor of any shape as pieces of a few rows."""
    x = x.reshape(-1, x.shape[-1])
    return x.split(max(1, _PIECE // x.shape[1]))


def _pieces(
    W: Tensor, name: str, parts: Sequence[_Part], kind: type[RWKV], reader: Reader
) -> Iterable[tuple[Tensor, Tensor]]:
    """(dW, W + dW) of each piece of the rows of the tensor `name`, which all of `parts` change."""
    if len(parts) == 1 and parts[0].weight == 1 and name in parts[0].plan.whole:
        return _replacements(W, _trained(parts[0], name, kind), reader)
    return _sums(W, [_change(p, name, kind) for p in parts], reader)


def _change(part: _Part, name: str, kind: type[RWKV]) -> _Change:
    """What an adapter with its weight adds to the tensor `name`."""
    path = name.removesuffix(".weight")
    if path in part.plan.linears:
        method, config = part.plan.linears[path]
        tensors = {key: part.adapter.tensors[f"{path}.{key}"] for key in method.names}
        if part.weight == 1:
            return lambda W, start: method.delta(W, start, tensors, config)
        return lambda W, start: method.delta(W, start, tensors, config).mul_(part.weight)
    trained = _trained(part, name, kind)
    rows = trained.reshape(-1, trained.shape[-1])
    return lambda W, start: (rows[start : start + len(W)].float() - W).mul_(part.weight)


def _trained(part: _Part, name: str, kind: type[RWKV]) -> Tensor:
    """A tensor that was trained directly, as files have it."""
    trained = part.adapter.tensors[name]
    return file_layout(trained, kind) if is_state(name) else trained


def _sums(W: Tensor, changes: Sequence[_Change], reader: Reader) -> Iterable[tuple[Tensor, Tensor]]:
    """(dW, W + dW) of each piece of the rows of a tensor, with dW the sum of the changes."""
    all_rows, start = _rows(W), 0
    # Used for every piece: new memory for each takes twice the time, because it is in no cache.
    stored, wide = torch.empty_like(all_rows[0]), torch.empty_like(all_rows[0], dtype=torch.float32)
    for rows in all_rows:
        n = len(rows)
        exact = wide[:n].copy_(reader.read(rows, stored[:n]))
        delta = changes[0](exact, start)
        for change in changes[1:]:
            delta += change(exact, start)
        start += n
        yield delta, exact.add_(delta)


def _replacements(W: Tensor, trained: Tensor, reader: Reader) -> Iterable[tuple[Tensor, Tensor]]:
    """(trained - W, trained) of each piece of the rows of a tensor that was trained directly."""
    for W_rows, trained_rows in zip(_rows(W), _rows(trained), strict=True):
        exact = trained_rows.float()
        yield exact - reader.read(W_rows).float(), exact


def _write_rows(
    name: str, pieces: Iterable[tuple[Tensor, Tensor]], out: Tensor, rounding: Rounding
) -> tuple[MergedLayer, bool]:
    """Writes the second tensor of each pair to `out`; the first is its difference from the base. Returns what merging
    did, and whether all that was written is finite."""
    delta_squares = lost_squares = 0.0
    lost, rng = torch.empty_like(_rows(out)[0], dtype=torch.float32), _rng(name)
    for (delta, exact), out_rows in zip(pieces, _rows(out), strict=True):
        round_into(out_rows, exact, rounding, rng)
        delta_squares += torch.linalg.vector_norm(delta).item() ** 2
        lost_squares += torch.linalg.vector_norm(torch.sub(out_rows, exact, out=lost[: len(exact)])).item() ** 2
    loss = math.sqrt(lost_squares / delta_squares) if delta_squares else 0.0
    # A value that is not finite makes the loss so too; a loss may also be beyond fp32 while the values are not.
    is_finite = math.isfinite(lost_squares) or _is_finite(out)
    return MergedLayer(name, math.sqrt(delta_squares), loss), is_finite


def _base_model(base: Mapping[str, Tensor], base_path: Path, mark: str) -> RWKV:
    """The base, to which adapters may be added."""
    model = build_model(base, base_path).eval().requires_grad_(False)
    model.fingerprint = mark
    return model


def _expected_logits(
    base: Mapping[str, Tensor],
    base_path: Path,
    mark: str,
    folders: Sequence[str | os.PathLike],
    weights: Sequence[float],
    tokens: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """The logits of the base, and of base + adapters."""
    model = _base_model(base, base_path, mark)
    with plain_reads(base.values()) as reader:
        base_logits = _logits(model, tokens, reader)
        return base_logits, _logits(_with_adapters(model, folders, weights), tokens, reader)


def _with_state(
    base: Mapping[str, Tensor],
    base_path: Path,
    mark: str,
    folders: Sequence[str | os.PathLike],
    weights: Sequence[float],
    file: Path,
) -> RWKV:
    """Base + adapters, with the state in `file` in place of theirs."""
    model = _base_model(base, base_path, mark)
    _with_adapters(model, folders, weights)
    for time_mix in model.time_mixes():
        time_mix.time_state = None
    load_initial_state(model, file)
    return model


def _logits(model: RWKV, tokens: Sequence[int], reader: Reader) -> Tensor:
    return logits_block_by_block(model, torch.tensor([tokens]), reader).float()


def _rng(name: str) -> torch.Generator:
    """The same random numbers for a tensor in every merge, and others for each tensor."""
    return torch.Generator().manual_seed(zlib.crc32(name.encode()))


def _compare(
    base_logits: Tensor, adapted: Tensor, merged: Tensor, tolerance: float
) -> tuple[float, float, float, float]:
    """The last four figures of `MergeReport`; RunError where the error is more than rounding."""
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
    return error, effect, _divergence(adapted, merged), _divergence(adapted, base_logits)


def _divergence(p: Tensor, q: Tensor) -> float:
    """KL(p || q) of the distributions with these logits (B, T, V), in nats, the mean over B and T."""
    log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1).mean().item()
