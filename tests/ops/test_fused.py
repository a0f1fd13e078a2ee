"""What lies between matrix products: the compiled kernels beside the formulas in float64, whose gradients are
PyTorch's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from rwkv_miss.ops import fused, fused_torch
from rwkv_miss.ops.fused_operators import OPS, FusedOp
from tests.ops.cases import odd_starts

# Largest error of a result, relative to its largest element.
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 2**-8}
# B, T, H, N: odd lengths, heads that fill no vector, parts of the parameters' sums that a row ends in.
SHAPES = [(1, 1, 1, 3), (2, 37, 3, 5), (3, 65, 2, 16), (2, 131, 1, 64), (1, 200, 2, 24)]


@dataclass(frozen=True)
class Case:
    """An op of `OPS`, and its arguments for a shape: each is drawn, or is no tensor, or is not given."""

    name: str
    arguments: Callable[[Callable[..., Tensor], int, int, int, int], list]

    @property
    def op(self) -> FusedOp:
        return next(op for op in OPS if op.name == self.name)


def _mixes(n: int, has_extra: bool, has_starts: bool) -> Callable:
    def arguments(draw, B, T, H, N):
        C = H * N
        starts = odd_starts(T, B) if has_starts else None
        return [draw(B, T, C), draw(B, C), starts, draw(n, C), draw(n, B, T, C) if has_extra else None]

    return arguments


def _arguments(draw, B, T, H, N):
    k, v, v_first, a, nu = (draw(B, T, H, N) for _ in range(5))
    return [k, v, v_first, a, nu, draw(1, 1, H * N), draw(1, 1, H * N)]


def _layer_0(draw, B, T, H, N):
    k, _, _, a, _, *rest = _arguments(draw, B, T, H, N)
    return [k, None, None, a, None, *rest]


def _output7(draw, B, T, H, N):
    C, shape = H * N, (B, T, H, N)
    heads = [draw(*shape) for _ in range(4)]
    return [*heads, draw(B, T, C), draw(C), draw(C), draw(H, N), 64e-5]


CASES = {
    "six mixes": Case("token_mix", _mixes(6, has_extra=False, has_starts=True)),
    "one mix": Case("token_mix", _mixes(1, has_extra=False, has_starts=False)),
    "mixes of each token": Case("token_mix", _mixes(5, has_extra=True, has_starts=True)),
    "wkv7_arguments": Case("wkv7_arguments", _arguments),
    "wkv7_arguments of layer 0": Case("wkv7_arguments", _layer_0),
    "wkv7_output": Case("wkv7_output", _output7),
    "relu_squared": Case("relu_squared", lambda draw, B, T, H, N: [draw(B, T, H * N)]),
    "wkv6_output": Case(
        "wkv6_output",
        lambda draw, B, T, H, N: [draw(B, T, H, N), draw(B, T, H * N), draw(H * N), draw(H * N), 64e-5],
    ),
    "gated": Case("gated", lambda draw, B, T, H, N: [draw(B, T, H * N), draw(B, T, H * N)]),
}


@pytest.fixture(params=CASES)
def case(request) -> Case:
    return CASES[request.param]


def make(case: Case, shape: tuple[int, ...], dtype: torch.dtype) -> list:
    rng = torch.Generator().manual_seed(0)
    return case.arguments(lambda *sizes: torch.randn(sizes, generator=rng).to(dtype), *shape)


def run(function: Callable, arguments: list, frozen: set[int] = frozenset()) -> tuple[list[Tensor], list]:
    """The outputs, and the gradient of each argument, None of one that has none or is in `frozen`, for output gradients
    that are drawn."""
    leaves = [
        x.detach().clone().requires_grad_(i not in frozen) if isinstance(x, Tensor) and x.is_floating_point() else x
        for i, x in enumerate(arguments)
    ]
    outputs = list(function(*leaves))
    rng = torch.Generator().manual_seed(1)
    weights = [torch.randn(y.shape, generator=rng).to(torch.bfloat16).to(y.dtype) for y in outputs]
    torch.autograd.backward(outputs, weights)
    return [y.detach() for y in outputs], [x.grad if isinstance(x, Tensor) else None for x in leaves]


def in_kernels(case: Case) -> Callable:
    assert not fused._unusable(case.op, torch.device("cpu"), torch.float32, 8)
    return fused._OPERATORS[case.op]


def exact(case: Case, arguments: list, **options) -> tuple[list[Tensor], list]:
    wide = [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in arguments]
    return run(getattr(fused_torch, case.name), wide, **options)


def assert_close(found: list, expected: list, tolerance: float) -> None:
    assert len(found) == len(expected)
    for i, (x, y) in enumerate(zip(found, expected, strict=True)):
        assert (x is None) == (y is None), i
        if x is None:
            continue
        assert x.shape == y.shape, i
        error, largest = (x.double() - y).abs().max(), y.abs().max()
        assert error <= tolerance * largest + 1e-30, f"{i}: {error:.1e} of {largest:.1e}"  # also fails on NaN


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_in_float64(case, dtype, shape, threads, poisoned, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    arguments = make(case, shape, dtype)
    outputs, grads = run(in_kernels(case), arguments)
    expected_outputs, expected_grads = exact(case, arguments)
    assert {x.dtype for x in (*outputs, *grads) if x is not None} == {dtype}
    assert_close(outputs, expected_outputs, TOLERANCE[dtype])
    assert_close(grads, expected_grads, 4 * TOLERANCE[dtype])
