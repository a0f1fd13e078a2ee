"""The WKV ops by the Triton kernels of flash-linear-attention (the package fla-core), on AMD, Intel and NVIDIA GPUs.

Its functions take inputs (B, T, H, N), decays as logarithms, and states (B, H, N_key, N_value). Where documents begin
inside the rows of a batch, it wants the rows end to end as one row (B = 1): `cu_seqlens` then has the step at which
each document begins, and last the number of steps, and each document has a first and a last state of its own.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from rwkv_miss.ops.wkv7_reference import DECAY_SCALE

# torch's names for the devices that Triton compiles for: "cuda" are NVIDIA's and, with ROCm, AMD's; "xpu" Intel's.
DEVICES = ("cuda", "xpu")
INSTALL = "pip install 'rwkv-miss[fla]'"
# The first version whose kernels were compared with the reference.
OLDEST = (0, 6)
# Triton cannot multiply matrices narrower than 16, and the kernels hold a head of at most 256 at once.
_HEAD_SIZES = range(16, 257)
# exp(-104) is 0 in fp32: a decay below it is 0, and its gradient too.
_MAX_W = math.log(104.0)


def unusable(op: str, device: torch.device, dtype: torch.dtype, n: int) -> str | None:
    """Why this backend cannot take tensors of that device, dtype and head size here, or None if it can: the same for
    both ops. Imports fla-core if nothing else stands against it."""
    if device.type not in DEVICES:
        return f"the tensors are on {device.type}, it takes GPUs ({', '.join(DEVICES)})"
    if dtype not in (torch.float32, torch.bfloat16):
        return f"the tensors are {dtype}, it takes float32 and bfloat16"
    if n not in _HEAD_SIZES:
        return f"the head size is {n}, it takes {_HEAD_SIZES[0]} to {_HEAD_SIZES[-1]}"
    return functions_or_reason()[1]


@cache
def functions_or_reason() -> tuple[dict[str, Callable] | None, str | None]:
    """fla-core's functions for "wkv6" and "wkv7", and None; or None and why it cannot be used."""
    try:
        import fla
        from fla.ops.rwkv6 import chunk_rwkv6
        from fla.ops.rwkv7 import chunk_rwkv7
    except ModuleNotFoundError as error:
        if error.name == "triton":
            return None, "Triton is not installed; PyTorch's builds for GPUs bring it"
        if error.name == "fla":
            return None, f"fla-core is not installed; {INSTALL}"
        return None, f"fla-core cannot be imported: {error}"
    except Exception as error:  # importing it looks for a GPU, which can fail in many ways
        return None, f"fla-core cannot be imported: {error!r}"
    if tuple(map(int, re.findall(r"\d+", fla.__version__)[:2])) < OLDEST:
        return None, f"fla-core {fla.__version__} is older than {'.'.join(map(str, OLDEST))}; {INSTALL}"
    return {"wkv6": chunk_rwkv6, "wkv7": chunk_rwkv7}, None


def wkv6(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor, seq_start: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`rwkv_miss.ops.wkv6` for arguments that were checked, with a state.

    The kernels sum logarithms of decays over chunks of 64 steps and take differences of the sums: the stronger the
    decays, the more digits are lost in y and, above all, in the gradient of w.
    """
    log_d = -torch.exp(w.float().clamp(max=_MAX_W))
    return _run("wkv6", {"r": r, "k": k, "v": v, "w": log_d}, state, seq_start, u=u)


def wkv7(
    r: Tensor, z: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor, seq_start: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`rwkv_miss.ops.wkv7` for arguments that were checked, with a state."""
    log_d = -DECAY_SCALE * torch.sigmoid(z.float())
    # Faster in bf16: chunks of 64 steps, in which keys are divided by decays of down to e^-19. What that loses is far
    # below the rounding of bf16, but not below that of fp32.
    options = {"safe_gate": True, "chunk_size": 64} if v.dtype == torch.bfloat16 else {}
    y, last = _run("wkv7", {"r": r, "w": log_d, "k": k, "v": v, "a": a, "b": b}, state.mT, seq_start, **options)
    return y, last.mT


def _run(
    name: str, inputs: dict[str, Tensor], state: Tensor, seq_start: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor]:
    """Calls fla-core's function for "wkv6" or "wkv7".

    Args:
        inputs: (B, T, H, N), by the names of the function's parameters.
        state: (B, H, N_key, N_value).
        options: further arguments of the function.

    Returns:
        y (B, T, H, N) and the last state (B, H, N_key, N_value).
    """
    v = inputs["v"]
    if v.numel() == 0:
        return v.clone(), state.clone()
    functions, reason = functions_or_reason()
    assert functions is not None, reason
    options |= {"scale": 1.0, "output_final_state": True}
    if seq_start is None:
        return functions[name](**inputs, initial_state=state, **options)

    begins = seq_start.clone()
    begins[:, 0] = True
    bounds = torch.cat([begins.flatten().nonzero().squeeze(1), begins.new_tensor([begins.numel()], dtype=torch.long)])
    last_of_row = begins.sum(1).cumsum(0) - 1
    first_of_row = last_of_row - begins.sum(1) + 1
    going_on = state.masked_fill(seq_start[:, 0, None, None, None], 0.0)
    states = state.new_zeros(len(bounds) - 1, *state.shape[1:]).index_copy(0, first_of_row, going_on)
    end_to_end = {letter: x.flatten(0, 1)[None] for letter, x in inputs.items()}
    y, last = functions[name](**end_to_end, initial_state=states, cu_seqlens=bounds, **options)
    return y.view_as(v), last[last_of_row]
