"""The recurrences on NVIDIA GPUs: cuda/*.cu, compiled on first use, as operators of torch.library."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from rwkv_miss.ops.cuda import driver
from rwkv_miss.ops.cuda.nvrtc import SOURCES, CompileError, compile_source
from rwkv_miss.ops.registration import WKV6, WKV7, Recurrence, register

HEAD_SIZES = (8, 16, 24, 32, 64, 96, 128)
# Steps between the states that the forward keeps for the backward: CHUNK of the sources.
SAVE_EVERY = 16
# Each op's kernels, in the order of their launches, and the names of their arguments before the sizes. d..: the
# gradient of what follows. What the op keeps besides the states has one too, from the second kernel for the third.
ARGUMENTS = {
    "wkv6": {
        "wkv6_forward": "r k v w u state_in seq_start y state_out saved_states",
        "wkv6_backward_values": "r k w u seq_start dy grad_state dv dstate",
        "wkv6_backward_keys": "r k v w u seq_start saved_states dy grad_state dr dk dw du",
    },
    "wkv7": {
        "wkv7_forward": "r z k v a b state_in seq_start y state_out saved_states saved_u",
        "wkv7_backward_values": "r z k a b seq_start dy grad_state dv du dstate",
        "wkv7_backward_keys": "r z k v a b seq_start saved_states saved_u dy du grad_state dr dz dk da db",
    },
}
_DTYPES = {torch.float32: 0, torch.bfloat16: 1}


def unusable(name: str, device: torch.device, dtype: torch.dtype, n: int) -> str | None:
    """Why the op ("wkv6" or "wkv7") cannot take tensors of that device, dtype and head size here, or None if it can.
    Compiles and loads the kernels on first use."""
    if reason := driver.refused(device):
        return reason
    if dtype not in _DTYPES:
        return f"the tensors are {dtype}, it takes float32 and bfloat16"
    if n not in HEAD_SIZES:
        return f"the head size is {n}, it takes {', '.join(map(str, HEAD_SIZES))}"
    return kernels_or_reason(name, driver.location(device)[0], dtype, n)[1]


def source(name: str) -> Path:
    return SOURCES / f"{name}.cu"


def options(dtype: torch.dtype, n: int) -> tuple[str, str]:
    """What a source is compiled with for inputs of that dtype and head size."""
    return f"-DHEAD_SIZE={n}", f"-DIO_BF16={_DTYPES[dtype]}"


@cache
def kernels_or_reason(name: str, index: int, dtype: torch.dtype, n: int) -> tuple[dict[str, object] | None, str | None]:
    try:
        image = compile_source(source(name), options(dtype, n), driver.capability(index))
        return driver.load(image, tuple(ARGUMENTS[name]), index), None
    except (CompileError, driver.DriverError) as error:
        return None, str(error)


def forward(op: Recurrence, inputs, state, seq_start, y, last, saved) -> None:
    """As `register` wants it."""
    if y.numel() == 0:
        last.copy_(state)
        return
    tensors = _by_name(op, inputs, seq_start, saved)
    tensors |= {"state_in": _ready(state), "y": y, "state_out": last}
    _launch(op, ("forward",), tensors)


def backward(op: Recurrence, inputs, seq_start, saved, grad_y, grad_state, grads) -> None:
    """As `register` wants it."""
    v = inputs[op.v]
    if v.numel() == 0:
        for x in grads:
            x.zero_()
        if grad_state is not None:
            grads[-1].copy_(grad_state)
        return
    tensors = _by_name(op, inputs, seq_start, saved)
    tensors |= {"dy": torch.zeros_like(v) if grad_y is None else _ready(grad_y), "grad_state": _ready(grad_state)}
    tensors |= {name.replace("saved_", "d"): torch.empty_like(tensors[name]) for name in op.saved}
    tensors |= dict(zip([*(f"d{letter}" for letter in op.inputs), "dstate"], grads, strict=True))
    _launch(op, ("backward_values", "backward_keys"), tensors)


def _by_name(op: Recurrence, inputs, seq_start, saved) -> dict[str, Tensor | None]:
    names = [*op.inputs, "seq_start", "saved_states", *op.saved]
    return dict(zip(names, map(_ready, (*inputs, seq_start, *saved)), strict=True))


def _ready(x: Tensor | None) -> Tensor | None:
    """Contiguous, and aligned as the kernels' widest access, which a slice need not be."""
    if x is None:
        return None
    x = x.contiguous()
    return x.clone() if x.data_ptr() % 16 else x


def _launch(op: Recurrence, names: tuple[str, ...], tensors: dict[str, Tensor | None]) -> None:
    """The caller may let go of the tensors at once: torch gives their memory to nothing that runs before the kernel."""
    v = tensors["v"]
    batch, n_steps, n_head, n = v.shape
    kernels, reason = kernels_or_reason(op.name, driver.location(v.device)[0], v.dtype, n)
    assert kernels is not None, reason
    kept = n if n <= 64 else 32  # by a block: see wkv.cuh
    for name in (f"{op.name}_{part}" for part in names):
        arguments = [tensors[x] for x in ARGUMENTS[op.name][name].split()]
        grid = batch * n_head, n // kept
        driver.launch(kernels[name], v.device, grid, 2 * kept, [*arguments, n_steps, n_head])


# (*inputs, state, seq_start) -> (y, the last state), as in `rwkv_miss.ops`, already checked.
wkv6 = register(WKV6, "cuda", SAVE_EVERY, forward, backward)
wkv7 = register(WKV7, "cuda", SAVE_EVERY, forward, backward)
