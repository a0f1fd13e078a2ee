"""What a checkpoint, a state file or an adapter folder holds, in words."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from rwkv_miss.adapters.files import AdapterFile, read_adapter
from rwkv_miss.checkpoint import read_checkpoint
from rwkv_miss.files import check_name
from rwkv_miss.fingerprints import fingerprint
from rwkv_miss.model.initial_state import is_state
from rwkv_miss.model.recognise import infer_config


def describe(path: str | os.PathLike) -> dict[str, str]:
    """What there is to say of it, by name, in order.

    Raises:
        UserError: it cannot be read, or is none of the three.
    """
    check_name(Path(path), "a file")
    if Path(path).is_dir():
        return _adapter(read_adapter(path))
    tensors = read_checkpoint(path)
    if all(map(is_state, tensors)):
        shapes = {tuple(t.shape) for t in tensors.values()}
        return {"state": f"{len(tensors)} layers", "shape": ", ".join(map(str, shapes))}
    return _model(tensors, path)


def _adapter(adapter: AdapterFile) -> dict[str, str]:
    found = {
        "adapter": adapter.config.method,
        "parameters": f"{sum(t.numel() for t in adapter.tensors.values()):,}",
        "base": (adapter.base_fingerprint or "not recorded")[:12],
    }
    if adapter.linears:
        targets = adapter.config.target_modules or []
        names = targets if isinstance(targets, str) else ", ".join(targets)
        found |= {"r": str(adapter.config.r), "linears": str(len(adapter.linears)), "targets": names}
    if adapter.whole:
        found["trained"] = ", ".join(_without_layers(adapter.whole))
    return found


def _model(tensors: Mapping[str, Tensor], path: str | os.PathLike) -> dict[str, str]:
    sizes = infer_config(tensors, path)
    return {
        "model": f"RWKV-{sizes.version}",
        "layers": str(sizes.n_layer),
        "n_embd": str(sizes.n_embd),
        "heads": f"{sizes.n_head} of {sizes.head_size}",
        "dim_ffn": str(sizes.dim_ffn),
        "vocabulary": f"{sizes.vocab_size:,}",
        "low rank": ", ".join(f"{k} {v}" for k, v in sizes.low_rank.items()),
        "parameters": f"{sum(t.numel() for t in tensors.values()):,}",
        "dtype": ", ".join(sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values()})),
        "fingerprint": fingerprint(tensors, path)[:12],
    }


def _without_layers(keys: Iterable[str]) -> list[str]:
    """Each kind of key once, without its layer."""
    return list(dict.fromkeys(re.sub(r"^blocks\.\d+\.", "", key) for key in keys))
