"""Linears whose frozen weight is stored in 8 or 4 bits, by bitsandbytes.

Only the storage is quantised: products are computed with the dequantised weight, in the dtype that the model runs in.
So the gradients are those of a plain linear that holds the dequantised weight.

Weights are quantised on the CPU whatever the model then runs on: the same file is the same base on every machine.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
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
from rwkv_miss.threads import one_thread_each

# Weights that are quantised or dequantised at a time: fp32 copies of them are made. On a CPU larger ones leave holes in
# the heap, which then grows with the number of linears (glibc); on a GPU smaller ones would take longer to launch.
_PIECE_ON_CPU, _PIECE = 2**18, 2**22
# Weights of a block in NF4. A row whose number is a multiple of it begins a block, whatever the rows' length.
_BLOCK = 64


class Format(NamedTuple):
    """How weights are stored: in blocks that share a scale. A weight matrix is cut into blocks row by row; the last one
    is filled up with zeros.

    block: (in_features) -> weights in a block.
    skip: the linears that are not quantised unless told otherwise (docs/quant.md has what they were chosen by).
    pack: weights (N, block) in the file's dtype -> packed, whose first dimension is N, and scales (N) in fp32.
    unpack: packed, scales, dtype -> weights (N, block) in that dtype.
    """

    block: Callable[[int], int]
    skip: tuple[str, ...]
    pack: Callable[[Tensor], tuple[Tensor, Tensor]]
    unpack: Callable[[Tensor, Tensor, torch.dtype], Tensor]


def _pack_int8(blocks: Tensor) -> tuple[Tensor, Tensor]:
    packed, scales, _ = _bitsandbytes().int8_vectorwise_quant(blocks)
    return packed, scales


def _unpack_int8(packed: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    return _bitsandbytes().int8_vectorwise_dequant(packed, scales).to(dtype)


def _pack_nf4(blocks: Tensor) -> tuple[Tensor, Tensor]:
    packed, state = _bitsandbytes().quantize_4bit(blocks, blocksize=_BLOCK, quant_type="nf4")
    return packed.view(len(blocks), -1), state.absmax


def _unpack_nf4(packed: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    # Rows of one block: bitsandbytes (0.50) takes wrong scales on a CPU where a block ends within a row.
    functional = _bitsandbytes()
    shape = torch.Size((len(scales), _BLOCK))
    state = functional.QuantState(scales, shape, blocksize=_BLOCK, quant_type="nf4", dtype=dtype)
    return functional.dequantize_4bit(packed.view(-1, 1), state)


FORMATS: dict[str, Format] = {
    "int8": Format(lambda in_features: in_features, (), _pack_int8, _unpack_int8),
    "nf4": Format(lambda in_features: _BLOCK, ("att.value", "att.output"), _pack_nf4, _unpack_nf4),
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
        step = _rows_of_piece(self.in_features, self.packed.device)
        for first in range(start - start % _BLOCK, stop, step):
            piece = self._unpack(first, min(first + step, stop))
            at = first - start
            found[max(at, 0) : at + len(piece)] = piece[max(-at, 0) :]
        return found

    def _unpack(self, start: int, stop: int) -> Tensor:
        """Rows from a multiple of `_BLOCK` on, where a block begins."""
        format, size = FORMATS[self.format], (stop - start) * self.in_features
        block = format.block(self.in_features)
        first = start * self.in_features // block
        last = first - (-size // block)
        weights = format.unpack(self.packed[first:last], self.scales[first:last], self.dtype)
        return weights.view(-1)[:size].view(-1, self.in_features)

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
    block = FORMATS[format].block(in_features)

    def pack(rows: Tensor) -> tuple[Tensor, Tensor]:
        return FORMATS[format].pack(F.pad(read(rows).reshape(-1), (0, -rows.numel() % block)).view(-1, block))

    found: list[Tensor] = []  # the whole weight's, into which each piece's are copied
    first = 0
    workers = torch.get_num_threads() if weight.device.type == "cpu" else 1
    with one_thread_each(), ThreadPoolExecutor(workers) as threads:
        for parts in threads.map(pack, weight.split(_rows_of_piece(in_features, weight.device))):
            found = found or [part.new_empty(-(-weight.numel() // block), *part.shape[1:]) for part in parts]
            for whole, part in zip(found, parts, strict=True):
                whole[first : first + len(part)] = part
            first += len(parts[0])
    packed, scales = found
    return QuantLinear(in_features, out_features, format, packed, scales, dtype)


def quantised_linears(sizes: ModelConfig, format: str, skip: Collection[str] | None) -> list[str]:
    """The paths of the linears that are quantised: those that an adapter can go beside, but for the ones in `skip`.

    Args:
        skip: of the names in `RWKV.linears`; None is the format's own choice.

    Raises:
        UserError: an entry of `skip` is none of them.
    """
    linears, skip = MODELS[sizes.version].linears, FORMATS[format].skip if skip is None else skip
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


def _rows_of_piece(in_features: int, device: torch.device) -> int:
    """How many rows are handled at a time: a multiple of `_BLOCK`, so that no block lies in two pieces."""
    weights = _PIECE_ON_CPU if device.type == "cpu" else _PIECE  # the meta device stands for a GPU
    return max(1, weights // in_features // _BLOCK) * _BLOCK


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
