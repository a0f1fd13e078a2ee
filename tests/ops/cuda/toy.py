"""The example of CONTRIBUTING.md: a CUDA kernel that the package does not have, added as the recipe says."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from rwkv_miss.errors import UserError
from rwkv_miss.ops.cuda import kernel
from rwkv_miss.ops.cuda.kernel import Program
from rwkv_miss.ops.cuda.programs import IO

TOY = Program(
    Path(__file__).with_name("toy.cu"),
    {"squared_relu_forward": "x y count", "squared_relu_backward": "x dy dx count"},
    {dtype: (option,) for dtype, option in IO.items()},
)
THREADS = 128


def squared_relu(x: Tensor) -> Tensor:
    """relu(x)^2 of every element, with its gradient.

    Args:
        x: of any shape, float32 or bfloat16, on an NVIDIA GPU.

    Raises:
        UserError: the kernel cannot be used for such a tensor here.
    """
    if x.dtype not in TOY.variants:
        raise UserError(f"squared_relu: x is {x.dtype}; expected float32 or bfloat16")
    if reason := kernel.unusable(TOY, x.dtype, x.device):
        raise UserError(f"squared_relu cannot be used: {reason}")
    return _forward(x)


@torch.library.custom_op("rwkv_miss::squared_relu_cuda", mutates_args=(), device_types="cuda")
def _forward(x: Tensor) -> Tensor:
    y = x.new_empty(x.shape)
    _launch("squared_relu_forward", {"x": kernel.ready(x), "y": y})
    return y


@torch.library.custom_op("rwkv_miss::squared_relu_cuda_backward", mutates_args=(), device_types="cuda")
def _backward(x: Tensor, dy: Tensor) -> Tensor:
    dx = x.new_empty(x.shape)
    _launch("squared_relu_backward", {"x": kernel.ready(x), "dy": kernel.ready(dy), "dx": dx})
    return dx


def _launch(name: str, tensors: dict[str, Tensor]) -> None:
    x = tensors["x"]
    if x.numel() > 0:
        blocks = -(-x.numel() // THREADS)
        kernel.launch(TOY, x.dtype, name, x.device, (blocks, 1), THREADS, {**tensors, "count": x.numel()})


_forward.register_fake(lambda x: x.new_empty(x.shape))
_backward.register_fake(lambda x, dy: x.new_empty(x.shape))
_forward.register_autograd(
    lambda ctx, dy: _backward(*ctx.saved_tensors, dy),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)
