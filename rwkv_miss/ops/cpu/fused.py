"""What the models compute between matrix products, on the CPU: the forward operators and the backward kernels of
fused.cpp."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from rwkv_miss.ops.cpu.kernel import call, operators_or_reason
from rwkv_miss.ops.fused_operators import FusedOp

# Tokens whose gradients of parameters are summed at a time.
PART_ROWS = 64
SOURCE = Path(__file__).with_name("fused.cpp")
_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def unusable(op: FusedOp, device: torch.device, dtype: torch.dtype, width: int) -> str | None:
    """Why the kernels cannot take tensors of that dtype here, or None if they can. Compiles at the first use."""
    if dtype not in _DTYPES:
        return f"the tensors are {dtype}, they take float32 and bfloat16"
    return operators_or_reason(SOURCE)


def launch(kernel: str, arguments: Mapping[str, Tensor | int | float | None]) -> None:
    """Runs a backward kernel; see `rwkv_miss.ops.fused_operators.Launch`."""
    x = next(iter(arguments.values()))
    assert isinstance(x, Tensor)
    ready = [y.contiguous() if isinstance(y, Tensor) else y for y in arguments.values()]
    call(SOURCE, f"{kernel}_{_DTYPES[x.dtype]}", [*ready, torch.get_num_threads()])
