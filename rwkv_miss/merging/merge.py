"""Merging: writes base + adapter as one file for any RWKV runtime, or the adapter's learned state alone. The file is
written tensor by tensor, and verified before it gets its name."""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from xxhash import xxh3_64

from rwkv_miss.adapters.files import check_fits, read_adapter
from rwkv_miss.checkpoint import DTYPES, TensorSpec, parse_dtype, read_checkpoint
from rwkv_miss.config import ModelConfig, Rounding
from rwkv_miss.errors import UserError
from rwkv_miss.export.table import target_of
from rwkv_miss.export.target import Target, Text, Weights
from rwkv_miss.files import atomic_write, check_name, flush
from rwkv_miss.fingerprints import fingerprint
from rwkv_miss.merging.ahead import computed_ahead
from rwkv_miss.merging.check import Adapted, add_to_checksum, check_tensors, compare, expected_logits, written_logits
from rwkv_miss.merging.runtime import Ran, run_in
from rwkv_miss.merging.sums import Part, Sums, is_finite, rng_of
from rwkv_miss.model.initial_state import is_state, state_shapes
from rwkv_miss.model.recognise import infer_config
from rwkv_miss.model.versions import MODELS
from rwkv_miss.plain_reads import plain_reads
from rwkv_miss.progress import Report
from rwkv_miss.threads import one_thread_each

_log = logging.getLogger("rwkv_miss")

_VERIFY_TOKENS = 32
# Bytes of a tensor that are written at a time, and those that are computed before they are written.
_CHUNK, _AHEAD = 2**23, 2**25


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

    dtype: the names of the dtypes in the file, such as "bfloat16, float32", or the one of a runtime's format.
    logits_error: the root mean square of the logits' difference, merged - (base + adapter), relative to that of the
        logits of base + adapter; None where the file is quantised, which is computed by a runtime alone.
    logits_effect: the same for (base + adapter) - base: how much the adapter changes the logits.
    divergence: KL(base + adapter || merged), the mean over the tokens of the check, in nats; None likewise.
    divergence_effect: KL(base + adapter || base), the same.
    ran: what a runtime computed of the file; None where none is installed.
    """

    out: Path
    dtype: str
    layers: list[MergedLayer]
    logits_error: float | None
    logits_effect: float
    divergence: float | None
    divergence_effect: float
    ran: Ran | None = None

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


class _Chunk(NamedTuple):
    """Rows `start` to `stop` of a tensor, taken as a matrix."""

    name: str
    start: int
    stop: int


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
    target: Target | None = None,
    text: Text | None = None,
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
        target: the format of the file; that which its name says, when not given. One of a runtime has a `dtype` of its
            own names; None takes the base's, or the format's first if it does not have that. The base alone may be
            written so, with no adapters.
        text: what the format says of text.

    Raises:
        UserError: the adapter was made for another base, does not fit, or a file cannot be read or written; or the base
            or what is written has values that are not finite.
        RunError: the written file does not compute what base + adapter computes.
    """
    base_path, out_path = Path(base_path), Path(out_path)
    is_export = target is not None
    target = target or target_of(out_path)
    check_out(out_path, base_path, overwrite, is_folder=not target.suffix)
    base = read_checkpoint(base_path)
    sizes = infer_config(base, base_path)
    kind = MODELS[sizes.version]
    folders = [adapter_folder] if isinstance(adapter_folder, str | os.PathLike) else list(adapter_folder)
    mark = fingerprint(base, base_path)
    parts = _read_parts(folders, weights, sizes, base, mark) if folders or not is_export else []
    states = {key: shape for key, shape in state_shapes(sizes).items() if any(key in p.plan.whole for p in parts)}
    if state_only and not states:
        raise UserError(f"{', '.join(map(str, folders))}: the adapter has no learned state; leave state_only out")
    if state_only and dtype is not None:
        raise UserError(f"dtype is {dtype}, but a state is written in fp32; leave dtype out")
    if states and not state_only and not kind.runtimes_find_state and not is_export:
        _log.warning(
            "RWKV-%s runtimes do not look for a state in the model's file: write it to a file of its own too, with "
            "--state_only, and load that as their state",
            sizes.version,
        )

    shapes = states if state_only else {key: t.shape for key, t in base.items()} | states
    named = ""
    if target.dtypes:
        named = _name_of_dtype(target, dtype, base["emb.weight"].dtype)
        dtypes = {name: target.stored(name, shape, named) for name, shape in shapes.items()}
    else:
        cast_to = None if dtype is None else parse_dtype(dtype)
        dtypes = {name: torch.float32 if is_state(name) else cast_to or base[name].dtype for name in shapes}
    if is_export:
        _check_holds(target, sizes, shapes, text)
    specs = {name: TensorSpec(shape, dtypes[name]) for name, shape in shapes.items()}
    if odd := {str(s.dtype) for s in specs.values() if s.dtype not in DTYPES.values()}:
        raise UserError(f"dtype is {odd.pop()}; a merged model has one of {', '.join(DTYPES)}")
    changed = {key for p in parts for key in (*p.plan.whole, *(f"{path}.weight" for path in p.plan.linears))}
    if rounding != "nearest" and not any(specs[key].dtype == torch.bfloat16 for key in changed & specs.keys()):
        raise UserError(f"rounding is {rounding}, which is for bf16, but nothing is merged into bf16 weights")
    tokens = check_tokens(tokens, sizes)
    done = 0

    def count() -> None:
        nonlocal done
        done += 1
        if on_tensor:
            on_tensor(done, 2 * len(specs))

    adapted = Adapted(base, base_path, mark, folders, [p.weight for p in parts])
    with one_thread_each(), atomic_write(out_path) as part, ThreadPoolExecutor(2) as threads:
        # Beside the summing and the writing, two threads with time to spare, what the file is to compute is found.
        expected = threads.submit(expected_logits, adapted, tokens)
        blank = Weights(sizes, specs, lambda _: (), named, text)
        layers, checksums = _write(part, target, blank, base, base_path, parts, rounding, count)
        flushed = threads.submit(_flush, part)
        written = target.read(part)
        check_tensors(written, specs, checksums, count)
        found, tolerance = None, target.tolerance.get(named, 0.0)
        if not tolerance:
            found, tolerance = written_logits(adapted, part, written, state_only, tokens)
        figures = compare(*expected.result(), found, tolerance)
        flushed.result()
        ran = run_in(target.runtime, part, None, tokens, expected.result()[1], tolerance) if target.runtime else None
    names = {named or str(s.dtype).removeprefix("torch.") for s in specs.values()}
    return MergeReport(out_path, ", ".join(sorted(names)), layers, *figures, ran)


def _check_holds(target: Target, sizes: ModelConfig, keys: Iterable[str], text: Text | None) -> None:
    """UserError where a runtime's format cannot hold the model, or the text that goes with it."""
    target.check_sizes(sizes)
    if state := next(filter(is_state, keys), None):
        raise UserError(
            f"the format has no place for a learned state ({state}); write the model for other runtimes with rwkv-miss "
            "merge, or train without a state"
        )
    if text is not None and len(text.tokens) > sizes.vocab_size:
        raise UserError(
            f"the tokenizer has {len(text.tokens):,} tokens, but the model {sizes.vocab_size:,}; give --tokenizer"
        )


def check_tokens(tokens: Sequence[int] | None, sizes: ModelConfig) -> list[int]:
    """The ids of the check's text that are in the vocabulary; random ones if there are none."""
    known = [i for i in tokens or () if i < sizes.vocab_size]
    return known or torch.randint(sizes.vocab_size, (_VERIFY_TOKENS,), generator=rng_of("")).tolist()


def _read_parts(
    folders: Sequence[str | os.PathLike],
    weights: Sequence[float] | None,
    sizes: ModelConfig,
    base: Mapping[str, Tensor],
    mark: str,
) -> list[Part]:
    weights = [1.0] * len(folders) if weights is None else weights
    if not folders or len(weights) != len(folders) or not all(map(math.isfinite, weights)):
        raise UserError(f"weights are {list(weights)} for {len(folders)} adapters; give each adapter one number")
    shapes = {key: t.shape for key, t in base.items()}
    adapters = [(read_adapter(folder), folder) for folder in folders]
    plans = [check_fits(adapter, sizes, shapes, mark, folder) for adapter, folder in adapters]
    return [Part(adapter, plan, w) for (adapter, _), plan, w in zip(adapters, plans, weights, strict=True)]


def _write(
    part: Path,
    target: Target,
    blank: Weights,
    base: Mapping[str, Tensor],
    base_path: Path,
    parts: Sequence[Part],
    rounding: Rounding,
    count: Callable[[], None],
) -> tuple[list[MergedLayer], dict[str, xxh3_64]]:
    """Writes the merged tensors to `part`. Returns what merging did, and each tensor's checksum.

    Args:
        blank: what is written, with `pieces` that give nothing.
    """
    specs = blank.specs
    checksums: dict[str, xxh3_64] = {}

    def compute(chunk: _Chunk, memory: Tensor) -> Tensor:
        name, dtype = chunk.name, specs[chunk.name].dtype
        out = memory.view(dtype).view(chunk.stop - chunk.start, -1)
        if not sums.write(name, chunk.start, out):
            if name in base and not is_finite(base[name]):
                raise UserError(f"{base_path}: {name} has values that are not finite; give a base that is sound")
            [short] = [short for short, known in DTYPES.items() if known == dtype]
            wider = "bf16" if short == "fp16" else "f32" if target.dtypes else "fp32"
            largest = torch.finfo(dtype).max
            raise UserError(f"{name}: not finite in {short}, whose largest value is {largest:,g}; give --dtype {wider}")
        return out

    def pieces(name: str) -> Iterator[Tensor]:
        checksums[name] = xxh3_64()
        for chunk in chunks[name]:
            rows = computed(chunk)
            yield rows
            add_to_checksum(checksums[name], rows, reader)  # here, since this thread has more time
        count()

    chunks = {name: _chunks(name, spec) for name, spec in specs.items()}
    nbytes = {chunk: size for parts_of in chunks.values() for chunk, size in parts_of.items()}
    with plain_reads(base.values()) as reader, computed_ahead(nbytes, compute, _AHEAD) as computed:
        sums = Sums(base, specs, parts, MODELS[blank.sizes.version], rounding, reader)
        target.write(part, replace(blank, pieces=pieces))
    layers = []
    for name, squares in sums.squares.items():
        loss = math.sqrt(squares.lost / squares.delta) if squares.delta else 0.0
        label = name.removesuffix(".weight") if any(p.adapts(name) for p in parts) else name
        layers.append(MergedLayer(label, math.sqrt(squares.delta), loss))
    return layers, checksums


def _chunks(name: str, spec: TensorSpec) -> dict[_Chunk, int]:
    """The chunks of a tensor, with the bytes of each."""
    rows, width = spec.shape[:-1].numel(), spec.shape[-1] * spec.dtype.itemsize
    step = max(1, _CHUNK // width)
    chunks = [_Chunk(name, start, min(start + step, rows)) for start in range(0, rows, step)]
    return {chunk: (chunk.stop - chunk.start) * width for chunk in chunks}


def _flush(part: Path) -> None:
    """The bytes of a large file begin their way to the disk; those of a folder follow when it gets its name."""
    if part.is_file():
        flush(part)


def _name_of_dtype(target: Target, given: str | torch.dtype | None, base: torch.dtype) -> str:
    """Which of a format's dtypes is written."""
    [short] = [short for short, known in DTYPES.items() if known == base]
    if given is None:
        own = {"fp16": "f16", "fp32": "f32"}.get(short, short)
        return own if own in target.dtypes else target.dtypes[0]
    check_dtype(given, target.dtypes)
    return str(given)


def check_dtype(given: str | torch.dtype, dtypes: Sequence[str]) -> None:
    """UserError where a format does not have the dtype."""
    if given not in dtypes:
        raise UserError(f"dtype is {given}, which the format does not have; it has {', '.join(dtypes)}")


def check_out(out: Path, base: Path, overwrite: bool, is_folder: bool = False) -> None:
    """UserError where `out` may not be written."""
    if is_folder:
        check_name(out, "a folder")
        if out.exists():
            raise UserError(f"{out}: exists already; give the name of a folder that does not")
    if out.is_dir():
        raise UserError(f"{out}: is a folder; give the name of the file to write")
    if not out.exists():
        return
    if base.exists() and out.samefile(base):
        raise UserError(f"{out}: is the base itself; give another name for the merged model")
    if not overwrite:
        raise UserError(f"{out}: exists already; give another name, or --overwrite true to replace it")
