"""The check of a merge: what was written is read back, and computes what base + adapter computes."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from xxhash import xxh3_64

from rwkv_miss.adapters.files import load_adapter
from rwkv_miss.adapters.inject import InUse, take_out
from rwkv_miss.adapters.several import set_adapter
from rwkv_miss.checkpoint import TensorSpec
from rwkv_miss.errors import RunError
from rwkv_miss.model.base import RWKV
from rwkv_miss.model.block_by_block import logits_block_by_block
from rwkv_miss.model.initial_state import load_initial_state
from rwkv_miss.model.load import build_model, running_dtype
from rwkv_miss.plain_reads import Reader, plain_reads

# The largest difference allowed between the logits of the merged file and of base + adapter: its root mean square
# relative to that of the logits. The two round differently, more so in bf16 and fp16.
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.1}


class Adapted(NamedTuple):
    """A base file, its fingerprint, and the folders and weights of the adapters that are merged into it."""

    base: Mapping[str, Tensor]
    path: Path
    mark: str
    folders: Sequence[str | os.PathLike]
    weights: Sequence[float]


class Figures(NamedTuple):
    """The figures of `MergeReport` that the check finds."""

    logits_error: float | None
    logits_effect: float
    divergence: float | None
    divergence_effect: float


def add_to_checksum(checksum: xxh3_64, tensor: Tensor, reader: Reader) -> xxh3_64:
    """The checksum with the tensor's bytes after those that it has seen."""
    for piece in tensor.contiguous().view(-1).view(torch.uint8).split(2**20):
        checksum.update(reader.read(piece).numpy().data)
    return checksum


def check_tensors(
    written: Mapping[str, Tensor],
    specs: Mapping[str, TensorSpec],
    checksums: Mapping[str, xxh3_64],
    count: Callable[[], None],
) -> None:
    """Looks at every byte of the file. RunError if one is not what was written."""

    def is_right(name: str) -> bool:
        tensor = written[name]
        is_as_specified = (tensor.shape, tensor.dtype) == (specs[name].shape, specs[name].dtype)
        read = add_to_checksum(xxh3_64(), tensor, reader)
        return is_as_specified and read.digest() == checksums[name].digest()

    with plain_reads(written.values()) as reader, ThreadPoolExecutor(2) as threads:
        for name, right in zip(written, threads.map(is_right, written), strict=True):
            if not right:
                raise RunError(f"{name} was read back changed (a faulty disk?); nothing was written")
            count()


def expected_logits(adapted: Adapted, tokens: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The logits of the base, and of base + adapters."""
    model = _with_adapters(_base_model(adapted), adapted)
    in_use = model.adapter
    with plain_reads(adapted.base.values()) as reader:
        if in_use is None:
            alone = _logits(model, [tokens], reader)
            return alone, alone
        assert isinstance(in_use, InUse)
        if in_use.whole:  # more than linears has two values
            adapted_logits = _logits(model, [tokens], reader)
            take_out(model)
            return _logits(model, [tokens], reader), adapted_logits

        # One pass over the file for two sequences, of which the first takes the way beside the adapters.
        def first_by_base(module: nn.Module, inputs: tuple[Tensor], y: Tensor) -> Tensor:
            return torch.cat([base[module](inputs[0][:1]), y[1:]])

        base = {in_use.modules[path]: cast(nn.Module, in_use.base[path]) for path in in_use.modules}
        for module in base:
            module.register_forward_hook(first_by_base)
        base_logits, adapted_logits = _logits(model, [tokens, tokens], reader).split(1)
        return base_logits, adapted_logits


def written_logits(
    adapted: Adapted, file: Path, written: Mapping[str, Tensor], state_only: bool, tokens: Sequence[int]
) -> tuple[Tensor, float]:
    """The logits of the written model, or of base + adapters with the state in the file in place of theirs; and how far
    they may be from those of base + adapters."""
    dtype = None
    if state_only:
        model, tolerance = _with_adapters(_base_model(adapted), adapted), 0.0
        for time_mix in model.time_mixes():
            time_mix.time_state = None
        load_initial_state(model, file)
    else:
        model = build_model(written, file, as_stored=True).eval().requires_grad_(False)
        dtype = running_dtype(written, None)
        # The coarser of the two files' dtypes says how far rounding may carry them apart.
        tolerance = max(_TOLERANCE[t.dtype] for tensors in (adapted.base, written) for t in tensors.values())
    with plain_reads([*adapted.base.values(), *written.values()]) as reader:
        return _logits(model, [tokens], reader, None if dtype == torch.bfloat16 else dtype), tolerance


def compare(base_logits: Tensor, adapted: Tensor, merged: Tensor | None, tolerance: float) -> Figures:
    """How far the logits are apart, those of the written file if they are known; RunError where that is more than
    rounding."""
    for logits, what in ((base_logits, "the base"), (adapted, "base + adapter"), (merged, "the written file")):
        if logits is not None and not torch.isfinite(logits).all():
            raise RunError(f"the logits of {what} are not finite; its weights are damaged; nothing was written")
    scale = adapted.square().mean().sqrt()
    effect = ((adapted - base_logits).square().mean().sqrt() / scale).item()
    if merged is None:
        return Figures(None, effect, None, _divergence(adapted, base_logits))
    error = ((merged - adapted).square().mean().sqrt() / scale).item()
    if not error <= tolerance:  # also if it is NaN, as for logits that are all zero
        raise RunError(
            f"the written file's logits differ from base + adapter by {error:.1e} of their size, more than rounding "
            f"({tolerance:.0e}); nothing was written"
        )
    return Figures(error, effect, _divergence(adapted, merged), _divergence(adapted, base_logits))


def _base_model(adapted: Adapted) -> RWKV:
    """The base, to which adapters may be added."""
    model = build_model(adapted.base, adapted.path).eval().requires_grad_(False)
    model.fingerprint = adapted.mark
    return model


def _with_adapters(model: RWKV, adapted: Adapted) -> RWKV:
    """The base with all the adapters at once."""
    for i, folder in enumerate(adapted.folders):
        load_adapter(model, folder, str(i))
    if list(adapted.weights) in ([], [1]):
        return model
    return set_adapter(model, {str(i): w for i, w in enumerate(adapted.weights)})


def _logits(model: RWKV, tokens: Sequence[Sequence[int]], reader: Reader, dtype: torch.dtype | None = None) -> Tensor:
    return logits_block_by_block(model, torch.tensor(tokens), reader, dtype).float()


def _divergence(p: Tensor, q: Tensor) -> float:
    """KL(p || q) of the distributions with these logits (B, T, V), in nats, the mean over B and T."""
    log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1).mean().item()
