"""An adapter as a file of its own for a runtime, which is verified before it gets its name."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from rwkv_miss.adapters.files import check_fits, read_adapter
from rwkv_miss.checkpoint import read_checkpoint
from rwkv_miss.errors import RunError
from rwkv_miss.export.table import TARGETS
from rwkv_miss.export.target import Adapter, AdapterTarget
from rwkv_miss.files import atomic_write
from rwkv_miss.fingerprints import fingerprint
from rwkv_miss.merging.check import Adapted, expected_logits
from rwkv_miss.merging.merge import check_dtype, check_out, check_tokens, merge
from rwkv_miss.merging.runtime import Ran, run_in
from rwkv_miss.model.recognise import infer_config

# The largest difference allowed between a factor and what is read back, relative to its size: half a step of the dtype.
_ROUNDING = {"f32": 0.0, "f16": 2**-11, "bf16": 2**-8}
# As in `check`, for a base of any dtype.
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.1}


@dataclass(frozen=True)
class AdapterReport:
    """What was written: beside how many linears, in which dtype; what a runtime computed, None if none is installed."""

    out: Path
    linears: int
    dtype: str
    ran: Ran | None


def write_alone(
    base_path: str | os.PathLike,
    adapter_folder: str | os.PathLike,
    out_path: str | os.PathLike,
    target: AdapterTarget,
    dtype: str | None = None,
    overwrite: bool = False,
    tokens: Sequence[int] | None = None,
) -> AdapterReport:
    """Writes an adapter without its base. What was written is read back, and if the format's runtime is installed, run
    on the base, which is written beside `out_path` for this and removed.

    Args:
        base_path: the checkpoint that the adapter was trained on.
        dtype: one of the target's, the first when not given.
        tokens: the text on which the runtime's results are compared, as in `merge`.

    Raises:
        UserError: the format cannot hold the adapter, which was made for another base, or does not fit; or a file
            cannot be read or written.
        RunError: the file was read back changed, or the runtime computes something else.
    """
    base_path, out_path, folder = Path(base_path), Path(out_path), Path(adapter_folder)
    check_out(out_path, base_path, overwrite, is_folder=not target.suffix)
    dtype = dtype or target.dtypes[0]
    check_dtype(dtype, target.dtypes)
    base = read_checkpoint(base_path)
    sizes, mark = infer_config(base, base_path), fingerprint(base, base_path)
    target.check_sizes(sizes)
    shapes = {key: t.shape for key, t in base.items()}
    file = read_adapter(folder)
    adapter = Adapter(folder, sizes, shapes, file, check_fits(file, sizes, shapes, mark, folder), dtype, target.holds)
    tokens = check_tokens(tokens, sizes)
    ran = None
    with atomic_write(out_path) as part:
        target.write(part, adapter)
        _check(part, target, adapter)
        if target.runtime and target.runtime.is_installed:
            _, logits = expected_logits(Adapted(base, base_path, mark, [folder], [1.0]), tokens)
            with TemporaryDirectory(prefix=f".{out_path.name}.", dir=out_path.parent) as beside:
                model = Path(beside) / f"base{TARGETS[target.base].suffix}"
                merge(base_path, [], model, tokens=tokens, target=replace(TARGETS[target.base], runtime=None))
                tolerance = max(_TOLERANCE[t.dtype] for t in base.values())
                ran = run_in(target.runtime, model, part, tokens, logits, tolerance)
    return AdapterReport(out_path, len(adapter.plan.linears), dtype, ran)


def _check(part: Path, target: AdapterTarget, adapter: Adapter) -> None:
    """RunError unless the file holds the adapter."""
    written = dict(target.read(part))
    for path, expected in chain(adapter.factors(), adapter.whole()):
        found = written.pop(path, None)
        if found is None or not all(_is_near(x, y, adapter.dtype) for x, y in zip(found, expected, strict=True)):
            raise RunError(f"{path} was read back changed (a faulty disk?); nothing was written")
    assert not written, list(written)


def _is_near(found: Tensor, expected: Tensor, dtype: str) -> bool:
    if found.shape != expected.shape:
        return False
    return bool(((found - expected).norm() <= _ROUNDING[dtype] * expected.norm()).item())
