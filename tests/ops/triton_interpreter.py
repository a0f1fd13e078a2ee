"""Fills the gaps of Triton's interpreter that keep it from running fla-core's kernels on a CPU. To be imported before
`fla`, in a process whose environment has TRITON_INTERPRET=1."""

from __future__ import annotations

import importlib
import sys

import numpy as np
import torch
import triton.language as tl
from triton.runtime import autotuner, interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


class Index(int):
    """The counter of a loop in a kernel. Unlike an int it has the method `to`, as the counters of compiled loops do."""

    def to(self, dtype: tl.dtype) -> Index:
        return self


def counted(*bounds) -> map:
    """`range` for kernels."""
    return map(Index, range(*bounds))


def gather(src: tl.tensor, index: tl.tensor, axis: int) -> tl.tensor:
    """triton.language.gather, looked up when it is called: the interpreter replaces the functions of triton.language,
    but fla-core holds the original of this one."""
    return tl.core.gather(src, index, axis)


def widened(x: TensorHandle) -> TensorHandle:
    """bfloat16 as float32, and anything else as it is: the interpreter keeps bfloat16 as integers that have its bits,
    and would compute with those."""
    if x.dtype.scalar != tl.bfloat16:
        return x
    return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def narrowed(x: np.ndarray) -> np.ndarray:
    """The bits of float32 rounded to the nearest bfloat16, as GPUs do it; the interpreter cuts the low bits off."""
    return torch.from_numpy(np.ascontiguousarray(x)).bfloat16().view(torch.uint16).numpy()


def prepare() -> None:
    """Makes the changes to Triton, and imports fla-core."""
    autotuner.Autotuner.do_bench = staticmethod(
        lambda _, quantiles: [1.0] * len(quantiles)
    )  # it would measure times on a GPU
    tl.gather = gather
    dot, binary_op = InterpreterBuilder.create_dot, InterpreterBuilder.binary_op
    convert = interpreter._convert_float

    def convert_to_nearest(x, source, target, *rest):
        if (source, target) == (tl.float32, tl.bfloat16):
            return narrowed(x)
        return convert(x, source, target, *rest)

    def dot_of_floats(self, a, b, *rest):
        return dot(self, widened(a), widened(b), *rest)

    def binary_op_of_floats(self, lhs, rhs, op):
        result = binary_op(self, widened(lhs), widened(rhs), op)
        if lhs.dtype.scalar != tl.bfloat16 or result.data.dtype != np.float32:  # the result of a comparison is no float
            return result
        return TensorHandle(narrowed(result.data), tl.bfloat16)

    def get_bf16(self, value):  # Triton 3.7 and 3.8 lack this method
        return self.create_fp_trunc(self.get_fp32(value), tl.bfloat16)

    interpreter._convert_float = convert_to_nearest
    InterpreterBuilder.get_bf16 = get_bf16
    InterpreterBuilder.create_dot, InterpreterBuilder.binary_op = dot_of_floats, binary_op_of_floats
    importlib.import_module("fla.ops.rwkv6")
    importlib.import_module("fla.ops.rwkv7")

    for name, module in list(sys.modules.items()):
        if name.startswith("fla.ops."):
            module.range = counted
