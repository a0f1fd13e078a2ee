"""PyTorch's own format in BlinkDL's layout, which the `rwkv` package, ChatRWKV and RWKV-Runner read."""

from __future__ import annotations

from pathlib import Path

from rwkv_miss.checkpoint import read_checkpoint, write_pth_in_pieces
from rwkv_miss.export.target import Target, Weights


def _write(path: Path, weights: Weights) -> None:
    write_pth_in_pieces(path, weights.specs, weights.pieces)


TARGET = Target(".pth", _write, read_checkpoint)
