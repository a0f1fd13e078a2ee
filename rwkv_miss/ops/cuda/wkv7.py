"""WKV-7 on NVIDIA GPUs: cuda/wkv7.cu as operators of torch.library, with fake (shapes alone) and autograd parts."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from rwkv_miss.ops.cuda import driver
from rwkv_miss.ops.cuda.nvrtc import SOURCES, CompileError, compile_source

SOURCE = SOURCES / "wkv7.cu"
KERNELS = ("wkv7_forward", "wkv7_backward_values", "wkv7_backward_keys")
HEAD_SIZES = (8, 16, 24, 32, 64, 96, 128)
# Steps between the states that the forward keeps for the backward: CHUNK of wkv7.cu.
SAVE_EVERY = 16
_DTYPES = {torch.float32: 0, torch.bfloat16: 1}
_INPUTS = "Tensor r, Tensor z, Tensor k, Tensor v, Tensor a, Tensor b"


def unusable(device: torch.device, dtype: torch.dtype, n: int) -> str | None:
    """Why this backend cannot take tensors of that device, dtype and head size, or None if it can. Compiles and loads
    the kernels on first use."""
    if reason := driver.refused(device):
        return reason
    if dtype not in _DTYPES:
        return f"the tensors are {dtype}, it takes float32 and bfloat16"
    if n not in HEAD_SIZES:
        return f"the head size is {n}, it takes {', '.join(map(str, HEAD_SIZES))}"
    return _kernels_or_reason(driver.location(device)[0], dtype, n)[1]


def wkv7_cuda(
    r: Tensor, z: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor, seq_start: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Arguments as in `rwkv_miss.ops.wkv7`, already checked."""
    save = torch.is_grad_enabled() and any(x.requires_grad for x in (r, z, k, v, a, b, state))
    y, last, _, _ = forward_op(r, z, k, v, a, b, state, seq_start, save)
    return y, last


def options(dtype: torch.dtype, n: int) -> tuple[str, str]:
    """What wkv7.cu is compiled with for inputs of that dtype and head size."""
    return f"-DHEAD_SIZE={n}", f"-DIO_BF16={_DTYPES[dtype]}"


@cache
def _kernels_or_reason(index: int, dtype: torch.dtype, n: int) -> tuple[dict[str, object] | None, str | None]:
    try:
        image = compile_source(SOURCE, options(dtype, n), driver.capability(index))
        return driver.load(image, KERNELS, index), None
    except (CompileError, driver.DriverError) as error:
        return None, str(error)


def forward(r, z, k, v, a, b, state, seq_start, save) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, the last state, and for the backward (empty unless `save`) a state every SAVE_EVERY steps and S a."""
    outputs = _empty_outputs(v, state, save)
    if v.numel() == 0:
        outputs[1].copy_(state)
        return outputs
    inputs = [_ready(x) for x in (r, z, k, v, a, b, state, seq_start)]
    saved = outputs[2:] if save else (None, None)
    _launch("wkv7_forward", [*inputs, *outputs[:2], *saved], v)
    return outputs


def backward(r, z, k, v, a, b, seq_start, states, u, grad_y, grad_state) -> tuple[Tensor, ...]:
    """The gradients of r, z, k, v, a, b and the first state, from what `forward` saved. grad_y and grad_state may be
    None for zeros."""
    grads = dr, dz, dk, dv, da, db, dstate = _empty_gradients((r, z, k, v, a, b), states)
    if v.numel() == 0:
        dstate.zero_() if grad_state is None else dstate.copy_(grad_state)
        return grads
    grad_y = torch.zeros_like(v) if grad_y is None else grad_y
    tensors = (r, z, k, v, a, b, seq_start, states, u, grad_y, grad_state)
    r, z, k, v, a, b, seq_start, states, u, dy, last = (_ready(x) for x in tensors)
    du = torch.empty_like(u)
    _launch("wkv7_backward_values", [r, z, k, a, b, seq_start, dy, last, dv, du, dstate], v)
    _launch("wkv7_backward_keys", [r, z, k, v, a, b, seq_start, states, u, dy, du, last, dr, dz, dk, da, db], v)
    return grads


def _ready(x: Tensor | None) -> Tensor | None:
    """Contiguous, and aligned as the kernels' widest access, which a slice need not be."""
    if x is None:
        return None
    x = x.contiguous()
    return x.clone() if x.data_ptr() % 16 else x


def _launch(name: str, tensors: list[Tensor | None], v: Tensor) -> None:
    """The caller may let go of the tensors at once: torch gives their memory to nothing that runs before the kernel."""
    batch, n_steps, n_head, n = v.shape
    kernels, reason = _kernels_or_reason(driver.location(v.device)[0], v.dtype, n)
    assert kernels is not None, reason
    kept = n if n <= 64 else 32  # by a block: see wkv7.cu
    driver.launch(kernels[name], v.device, (batch * n_head, n // kept), 2 * kept, [*tensors, n_steps, n_head])


def _empty_outputs(v: Tensor, state: Tensor, save: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, n_steps, n_head, n = v.shape
    chunks = -(-n_steps // SAVE_EVERY)
    states = v.new_empty((batch, n_head, chunks, n, n) if save else (0,), dtype=torch.float32)
    u = v.new_empty(v.shape if save else (0,), dtype=torch.float32)
    return v.new_empty(v.shape), state.new_empty(state.shape), states, u


def _empty_gradients(inputs: tuple[Tensor, ...], states: Tensor) -> tuple[Tensor, ...]:
    batch, n_head, _, n, _ = states.shape
    return *(x.new_empty(x.shape) for x in inputs), states.new_empty((batch, n_head, n, n))


forward_op = torch.library.custom_op(
    "rwkv_miss::wkv7_cuda",
    forward,
    mutates_args=(),
    device_types="cuda",
    schema=f"({_INPUTS}, Tensor state, Tensor? seq_start, bool save) -> (Tensor, Tensor, Tensor, Tensor)",
)
backward_op = torch.library.custom_op(
    "rwkv_miss::wkv7_cuda_backward",
    backward,
    mutates_args=(),
    device_types="cuda",
    schema=f"({_INPUTS}, Tensor? seq_start, Tensor states, Tensor u, Tensor? grad_y, Tensor? grad_state)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@forward_op.register_fake
def _(r, z, k, v, a, b, state, seq_start, save):
    return _empty_outputs(v, state, save)


@backward_op.register_fake
def _(r, z, k, v, a, b, seq_start, states, u, grad_y, grad_state):
    return _empty_gradients((r, z, k, v, a, b), states)


def _setup_context(ctx, inputs, output):
    *tensors, _, seq_start, _ = inputs
    ctx.save_for_backward(*tensors, seq_start, *output[2:])
    ctx.set_materialize_grads(False)


def _autograd_backward(ctx, grad_y, grad_state, _grad_states, _grad_u):
    return *backward_op(*ctx.saved_tensors, grad_y, grad_state), None, None


forward_op.register_autograd(_autograd_backward, setup_context=_setup_context)
