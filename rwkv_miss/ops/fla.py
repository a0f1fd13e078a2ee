"""The recurrences by flash-linear-attention's Triton kernels (the package fla-core), on GPUs of AMD, Intel and NVIDIA.

Its functions take (B, T, H, N), decays as logarithms, and states (B, H, N_key, N_value). Documents in a row: B is 1,
`cu_seqlens` says where each begins and the last ends, and each has a state of its own.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from rwkv_miss.ops.wkv7_reference import DECAY_SCALE

# What torch calls the devices that Triton compiles for; ROCm's are cuda, Intel's xpu.
DEVICES = ("cuda", "xpu")
INSTALL = "pip install 'rwkv-miss[fla]'"
# The first version whose kernels were compared with the reference.
OLDEST = (0, 6)
# Triton multiplies no matrices narrower than 16; the kernels hold a whole head's width, of 256 at most.
_HEAD_SIZES = range(16, 257)
# exp(-104) is 0 in fp32: a decay below it is 0, and its gradient too.
_MAX_W = math.log(104.0)


def unusable(device: torch.device, dtype: torch.dtype, n: int) -> str | None:
    """Why this backend cannot take tensors of that device, dtype and head size here, or None if it can. Imports
    fla-core, once all else is well."""
    if device.type not in DEVICES:
        return f"the tensors are on {device.type}, it takes GPUs ({', '.join(DEVICES)})"
    if dtype not in (torch.float32, torch.bfloat16):
        return f"the tensors are {dtype}, it takes float32 and bfloat16"
    if n not in _HEAD_SIZES:
        return f"the head size is {n}, it takes {_HEAD_SIZES[0]} to {_HEAD_SIZES[-1]}"
    return functions_or_reason()[1]


@cache
def functions_or_reason() -> tuple[dict[str, Callable] | None, str | None]:
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
    except Exception as error:  # it looks for a GPU while it is imported
        return None, f"fla-core cannot be imported: {error!r}"
    if tuple(map(int, re.findall(r"\d+", fla.__version__)[:2])) < OLDEST:
        return None, f"fla-core {fla.__version__} is older than {'.'.join(map(str, OLDEST))}; {INSTALL}"
    return {"wkv6": chunk_rwkv6, "wkv7": chunk_rwkv7}, None


def wkv6(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor, seq_start: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Arguments as in `rwkv_miss.ops.wkv6`, already checked.

    The kernels sum logarithms of decays over chunks of 64 steps and take differences: the stronger the decays, the
    more digits y and, above all, the gradient of w lose.
    """
    log_d = -torch.exp(w.float().clamp(max=_MAX_W))
    return _run("wkv6", {"r": r, "k": k, "v": v, "w": log_d}, state, seq_start, u=u)


def wkv7(
    r: Tensor, z: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor, seq_start: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Arguments as in `rwkv_miss.ops.wkv7`, already checked."""
    log_d = -DECAY_SCALE * torch.sigmoid(z.float())
    # Chunks of 64 steps, and within them matrix products of keys divided by decays of down to e^-19: what that
    # loses is far below bf16's rounding, but not below fp32's.
    options = {"safe_gate": True, "chunk_size": 64} if v.dtype == torch.bfloat16 else {}
    y, last = _run("wkv7", {"r": r, "w": log_d, "k": k, "v": v, "a": a, "b": b}, state.mT, seq_start, **options)
    return y, last.mT


def _run(name: str, inputs: dict[str, Tensor], state: Tensor, seq_start: Tensor | None, **options) -> tuple:
    """y and the last state; states are (B, H, N_key, N_value)."""
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
