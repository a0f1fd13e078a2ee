"""What lies between matrix products: the compiled kernels beside the formulas in float64, whose gradients are
PyTorch's."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from rwkv_miss.benchmarks.common import threads as thread_count
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
def test_in_float64(case, dtype, shape, threads, poisoned):
    arguments = make(case, shape, dtype)
    with thread_count(threads):
        outputs, grads = run(in_kernels(case), arguments)
    expected_outputs, expected_grads = exact(case, arguments)
    assert {x.dtype for x in (*outputs, *grads) if x is not None} == {dtype}
    assert_close(outputs, expected_outputs, TOLERANCE[dtype])
    assert_close(grads, expected_grads, 4 * TOLERANCE[dtype])


def test_frozen_arguments_have_no_gradient(case):
    """Nor are the gradients of the others changed by it."""
    arguments = make(case, (2, 37, 3, 5), torch.float32)
    tensors = [i for i, x in enumerate(arguments) if isinstance(x, Tensor) and x.is_floating_point()]
    _, everything = run(in_kernels(case), arguments)
    for i in tensors:
        frozen = set(tensors) - {i}
        _, grads = run(in_kernels(case), arguments, frozen)
        assert all(x is None for j, x in enumerate(grads) if j != i) and torch.equal(grads[i], everything[i])


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("name", ["six mixes", "mixes of each token"])
def test_nothing_crosses_the_start_of_a_document(name, value):
    """Neither a value that is not finite nor a gradient."""
    arguments = make(CASES[name], (1, 70, 2, 8), torch.float32)
    starts = arguments[2]
    starts[:] = False
    starts[0, [30, 64]] = True  # 64: where a part of the sums begins
    for place in (29, 63):
        changed = [y.clone() if isinstance(y, Tensor) else y for y in arguments]
        changed[0][0, place] = value
        for y in in_kernels(CASES[name])(*changed):
            assert y[0, place].isfinite().sum() == 0 and y[0, place + 1 :].isfinite().all()
    for place in (30, 64):
        leaves = [y.clone() if isinstance(y, Tensor) else y for y in arguments]
        leaves[0].requires_grad_()
        outputs = in_kernels(CASES[name])(*leaves)
        outputs[0][0, place].mul(value).sum().backward()
        assert leaves[0].grad[0, place].isfinite().sum() == 0 and leaves[0].grad[0, :place].isfinite().all()
    starts[0, 0] = True
    last = arguments[1].fill_(value).requires_grad_()
    outputs = in_kernels(CASES[name])(*arguments)
    assert all(y.isfinite().all() for y in outputs)
    outputs[0].sum().backward()
    assert not last.grad.any()


def test_shapes_without_values(case):
    """On the meta device results and gradients are those of the kernels, but for their values."""
    arguments = make(case, (2, 9, 3, 5), torch.bfloat16)
    outputs, grads = run(in_kernels(case), arguments)

    leaves = [x.to("meta") if isinstance(x, Tensor) else x for x in arguments]
    found = [fused._OPERATORS[case.op](*leaves)]
    leaves = [x.requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in leaves]
    made = fused._OPERATORS[case.op](*leaves)
    torch.autograd.backward(list(made), [torch.empty_like(y) for y in made])
    found += [made, [x.grad for x in leaves if isinstance(x, Tensor)]]
    kept = [x for x, y in zip(grads, arguments, strict=True) if isinstance(y, Tensor)]
    for mine, real in zip(found, (outputs, outputs, kept), strict=True):
        assert [x if x is None else (x.shape, x.dtype) for x in mine] == [
            x if x is None else (x.shape, x.dtype) for x in real
        ]


def test_rows_alone_and_together_are_equal(case):
    """To the bit, as are the pieces that a row is cut into."""
    arguments = make(case, (3, 50, 3, 5), torch.bfloat16)
    if case.name == "token_mix":
        pytest.skip("its pieces take the token before them: the models' tests of chunks")
    together = in_kernels(case)(*arguments)
    for i, piece in ((1, slice(0, 50)), (2, slice(7, 8))):
        alone = [x[i : i + 1, piece] if isinstance(x, Tensor) and x.shape[:2] == (3, 50) else x for x in arguments]
        for x, y in zip(in_kernels(case)(*alone), together, strict=True):
            assert torch.equal(x, y[i : i + 1, piece])


def test_formulas_where_there_is_no_kernel(caplog):
    """And that is said, once."""
    for cached in (fused._unusable, fused._announce):
        cached.cache_clear()
    x = torch.randn(1, 3, 4, dtype=torch.float64)
    with caplog.at_level(logging.INFO, logger="rwkv_miss"):
        for _ in range(2):
            assert torch.equal(fused.relu_squared(x), torch.relu(x).square())
            assert torch.equal(fused.gated(x, x), torch.sigmoid(x) * x)
    said = "between matrix products: PyTorch operations, no kernels on cpu: the tensors are torch.float64"
    assert [r.levelname for r in caplog.records] == ["WARNING"] and said in caplog.records[0].getMessage()
