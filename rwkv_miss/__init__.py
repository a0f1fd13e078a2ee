"""Fine-tune RWKV with MiSS and merge the result for any RWKV runtime. Importing this compiles nothing."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rwkv_miss.adapters.files import load_adapter, save_adapter
    from rwkv_miss.adapters.inject import inject
    from rwkv_miss.adapters.several import set_adapter
    from rwkv_miss.config import AdapterConfig, ModelConfig, TrainConfig
    from rwkv_miss.merging.merge import MergeReport, merge
    from rwkv_miss.model.load import load_model
    from rwkv_miss.training.result import TrainResult
    from rwkv_miss.training.start import train

__version__ = "0.1.0"

# Each public name and the module it lives in; the module is imported when the name is first used, so that
# `rwkv-miss --help` does not wait for torch.
_HOMES = {
    "AdapterConfig": "config",
    "ModelConfig": "config",
    "TrainConfig": "config",
    "load_model": "model.load",
    "inject": "adapters.inject",
    "save_adapter": "adapters.files",
    "load_adapter": "adapters.files",
    "set_adapter": "adapters.several",
    "train": "training.start",
    "TrainResult": "training.result",
    "merge": "merging.merge",
    "MergeReport": "merging.merge",
}
__all__ = [
    "AdapterConfig",
    "MergeReport",
    "ModelConfig",
    "TrainConfig",
    "TrainResult",
    "inject",
    "load_adapter",
    "load_model",
    "merge",
    "save_adapter",
    "set_adapter",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'rwkv_miss' has no attribute {name!r}")
    return getattr(importlib.import_module(f"rwkv_miss.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
