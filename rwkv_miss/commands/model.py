"""Loads the model that a command works with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from rwkv_miss.model.base import RWKV

Dtype = Literal["bf16", "fp16", "fp32"]
"""The dtypes that files may be written in."""
RunDtype = Literal["bf16", "fp32"]
"""The dtypes that models run in."""


def load(
    path: str, adapter: str | None, dtype: RunDtype | None, quant: str = "none", quant_skip: list[str] | None = None
) -> RWKV:
    """The model in a file, quantised if asked, with the adapter in a folder, for inference, on the GPU if there is
    one."""
    import torch

    from rwkv_miss.adapters.files import load_adapter
    from rwkv_miss.model.load import load_model

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(path, dtype, device, quant=quant, quant_skip=quant_skip).eval()
    return load_adapter(model, adapter) if adapter else model
