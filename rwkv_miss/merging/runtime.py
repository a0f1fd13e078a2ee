"""What a runtime computes of an exported file, beside what base + adapter compute here."""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from rwkv_miss.errors import RunError
from rwkv_miss.export.target import Runtime

# Beginnings of the check's text, of each of which the runtime computes what follows.
_PROMPTS = 8


@dataclass(frozen=True)
class Ran:
    """What a runtime computed.

    runtime: its package and version.
    prompts: of how many texts it computed the token that follows; agreeing: of how many its likeliest is ours.
    error: the root mean square of the difference of the log-probabilities that it gave from ours, relative to that of
        the logits.
    """

    runtime: str
    prompts: int
    agreeing: int
    error: float


def run_in(
    runtime: Runtime, file: Path, adapter: Path | None, tokens: Sequence[int], logits: Tensor, tolerance: float
) -> Ran | None:
    """Runs a written file, with an adapter's file beside it if that is given.

    Args:
        tokens: the text of the check; logits: (1, T, V), what base + adapter compute for it.
        tolerance: the error that is allowed.

    Returns:
        None if the runtime is not installed.

    Raises:
        RunError: it computes something else.
    """
    if not runtime.is_installed:
        return None
    name = f"{runtime.package} {importlib.metadata.version(runtime.package)}"
    lengths = sorted({1 + i * (len(tokens) - 1) // (_PROMPTS - 1) for i in range(_PROMPTS)})
    found = runtime.log_probs(file, adapter, [list(tokens[:n]) for n in lengths])
    ours = [logits[0, n - 1].log_softmax(-1) for n in lengths]
    agreeing = sum(next(iter(theirs)) == own.argmax().item() for theirs, own in zip(found, ours, strict=True))
    squares = [(own[i].item() - p) ** 2 for theirs, own in zip(found, ours, strict=True) for i, p in theirs.items()]
    error = math.sqrt(sum(squares) / len(squares)) / logits.square().mean().sqrt().item()
    if not error <= tolerance:  # also if it is NaN
        raise RunError(
            f"{name} computes something else of the written file: log-probabilities differ from base + adapter by "
            f"{error:.1e} of the logits' size, more than rounding ({tolerance:.0e}); nothing was written"
        )
    return Ran(name, len(found), agreeing, error)
