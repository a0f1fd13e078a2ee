"""Linears whose frozen weight is stored in 8 or 4 bits, by bitsandbytes.

Only the storage is quantised: products are computed with the dequantised weight, in the dtype that the model runs in.
So the gradients are those of a plain linear that holds the dequantised weight.

Weights are quantised on the CPU whatever the model then runs on: the same file is the same base on every machine.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from rwkv_miss.config import ModelConfig
from rwkv_miss.errors import UserError
from rwkv_miss.model.linear import FrozenLinear
from rwkv_miss.model.recognise import parameter_shapes
from rwkv_miss.model.versions import MODELS

# Weights of NF4 that share a scale: a block. A row whose number is a multiple of it begins one, whatever its length.
_BLOCK = 64
# Weights that are quantised or dequantised at a time: fp32 copies of them are made.
_PIECE = 2**22


class Format(NamedTuple):
    """How the rows of a weight are stored: as a flat tensor of packed numbers and a flat one of fp32 scales.

    per_element, per_scale: weights in a packed element, and (in_features) -> weights that share a scale.
    pack: rows (M, in_features) -> packed, scales.
    unpack: packed, scales, shape (M, in_features), dtype -> rows in that dtype.
    """

    per_element: int
    per_scale: Callable[[int], int]
    pack: Callable[[Tensor], tuple[Tensor, Tensor]]
    unpack: Callable[[Tensor, Tensor, torch.Size, torch.dtype], Tensor]


def _pack_int8(rows: Tensor) -> tuple[Tensor, Tensor]:
    packed, scales, _ = _bitsandbytes().int8_vectorwise_quant(rows)
    return packed.view(-1), scales


def _unpack_int8(packed: Tensor, scales: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    return _bitsandbytes().int8_vectorwise_dequant(packed.view(shape), scales).to(dtype)


def _pack_nf4(rows: Tensor) -> tuple[Tensor, Tensor]:
    packed, state = _bitsandbytes().quantize_4bit(rows, blocksize=_BLOCK, quant_type="nf4")
    return packed.view(-1), state.absmax


def _unpack_nf4(packed: Tensor, scales: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    functional = _bitsandbytes()
    state = functional.QuantState(scales, shape, blocksize=_BLOCK, quant_type="nf4", dtype=dtype)
    return functional.dequantize_4bit(packed.view(-1, 1), state)


FORMATS: dict[str, Format] = {
    "int8": Format(1, lambda in_features: in_features, _pack_int8, _unpack_int8),
    "nf4": Format(2, lambda in_features: _BLOCK, _pack_nf4, _unpack_nf4),
}
"""What `TrainConfig.quant` may name. int8: a scale for each row, its largest absolute value (LLM.int8(), arXiv
2208.07339, of the weights alone). nf4: 16 values that are quantiles of a normal distribution, a scale for each block of
64 weights (QLoRA, arXiv 2305.14314, whose scales are not quantised again here)."""


class QuantLinear(FrozenLinear):
    """A frozen linear whose weight is stored in one of `FORMATS`. Its tensors are no parameters and in no state dict:
    nothing trains, shards or saves them, and they come from the base's file.

    Args:
        packed, scales: of the whole weight, as `Format` has them.
        dtype: that the model runs in.
    """

    packed: Tensor
    scales: Tensor

    def __init__(
        self, in_features: int, out_features: int, format: str, packed: Tensor, scales: Tensor, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.format, self.dtype = format, dtype
        self.register_buffer("packed", packed, persistent=False)
        self.register_buffer("scales", scales, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return _Product.apply(x, self)

    def input_gradient(self, dy: Tensor) -> Tensor:
        return torch.mm(dy, self.rows(0, self.out_features))

    def rows(self, start: int, stop: int) -> Tensor:
        found = torch.empty(stop - start, self.in_features, dtype=self.dtype, device=self.packed.device)
        step = _rows_of_piece(self.in_features)
        for first in range(start - start % _BLOCK, stop, step):
            last = min(first + step, stop)
            piece = self._unpack(first, last)
            found[max(first - start, 0) : last - start] = piece[max(start - first, 0) :]
        return found

    def _unpack(self, start: int, stop: int) -> Tensor:
        """Rows from a multiple of `_BLOCK` on."""
        format = FORMATS[self.format]
        packed, scales = (
            stored[start * self.in_features // weights : -(-stop * self.in_features // weights)]
            for stored, weights in (
                (self.packed, format.per_element),
                (self.scales, format.per_scale(self.in_features)),
            )
        )
        return format.unpack(packed, scales, torch.Size((stop - start, self.in_features)), self.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, format={self.format}"


class _Product(torch.autograd.Function):
    """x W^T. The dequantised weight is not kept for the backward pass, but made again."""

    @staticmethod
    def forward(ctx, x: Tensor, linear: QuantLinear) -> Tensor:
        ctx.linear = linear
        return F.linear(x, linear.rows(0, linear.out_features))

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        dx = ctx.linear.input_gradient(dy.reshape(-1, dy.shape[-1]))
        return dx.view(*dy.shape[:-1], -1), None


def quantise(weight: Tensor, format: str, dtype: torch.dtype, read: Callable[[Tensor], Tensor]) -> QuantLinear:
    """A linear with the quantised `weight` (out_features, in_features), which is read and quantised in pieces.

    Args:
        read: a piece of the weight -> its values, in memory.
        dtype: that the model runs in. What is quantised are the values of the file, in the precision that they have.
    """
    out_features, in_features = weight.shape
    pieces = [FORMATS[format].pack(read(rows)) for rows in weight.split(_rows_of_piece(in_features))]
    packed, scales = (torch.cat(parts) for parts in zip(*pieces, strict=True))
    return QuantLinear(in_features, out_features, format, packed, scales, dtype)


def quantised_linears(sizes: ModelConfig, skip: Collection[str]) -> list[str]:
    """The paths of the linears that are quantised: those that an adapter can go beside, but for the ones in `skip`.

    Args:
        skip: of the names in `RWKV.linears`.

    Raises:
        UserError: an entry of `skip` is none of them.
    """
    linears = MODELS[sizes.version].linears
    if unknown := [name for name in skip if name not in linears]:
        raise UserError(f"quant_skip: {unknown[0]} is no linear that is quantised; there are: {', '.join(linears)}")
    ends = tuple(f".{name}.weight" for name in linears if name not in skip)
    return [key.removesuffix(".weight") for key in parameter_shapes(sizes) if key.endswith(ends)]


def refuse_training(keys: Iterable[str], quantised: Collection[str]) -> None:
    """UserError if one of `keys`, the parameters of the base that are trained directly, is the weight of a linear in
    `quantised`."""
    if found := [key for key in keys if key.removesuffix(".weight") in quantised]:
        raise UserError(
            f"{found[0]} would be trained, but it is quantised, and a quantised weight is frozen; put its linear into "
            "quant_skip, leave it out of what is trained (adapter.method full, adapter.modules_to_save), or leave "
            "quant out"
        )


def unusable(format: str, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why weights in that format cannot be used on a device; None if they can. It is tried."""
    try:
        linear = quantise(torch.ones(_BLOCK, _BLOCK), format, dtype, lambda rows: rows).to(device)
        found = linear(torch.ones(1, _BLOCK, dtype=dtype, device=device))
    except UserError as e:
        return str(e)
    except Exception as e:  # of bitsandbytes, which has a library for each device
        return f"{type(e).__name__}: {str(e).strip().splitlines()[0] if str(e).strip() else ''}"
    return None if bool((found == _BLOCK).all()) else "bitsandbytes gives wrong results"


def _rows_of_piece(in_features: int) -> int:
    """How many rows are handled at a time: a multiple of `_BLOCK`, so that no block lies in two pieces."""
    return max(1, _PIECE // in_features // _BLOCK) * _BLOCK


@cache
def _bitsandbytes() -> Any:
    """bitsandbytes.functional; UserError where it cannot be imported."""
    # Imported on a CPU with bf16 products, it warns that a package for faster inference is missing.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        from bitsandbytes import functional
    except (ImportError, OSError, RuntimeError) as e:
        raise UserError(f"bitsandbytes cannot be imported ({e}); install it: pip install 'rwkv-miss[quant]'") from None
    return functional
