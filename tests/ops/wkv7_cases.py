"""Inputs for the tests of WKV-7, and the comparison of a backend with the reference."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from rwkv_miss.ops.wkv7_reference import wkv7_reference

NAMES = ("y", "last state", "dr", "dz", "dk", "dv", "da", "db", "dstate")
# Relative errors in norm: a few roundings of the sums, or of the rounding to bf16 of what has the inputs' dtype.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 6e-3}


def make_inputs(
    n_steps: int, n: int, dtype: torch.dtype = torch.float32, z_shift: float = 0.0, batch: int = 2, n_head: int = 2
) -> tuple[list[Tensor], Tensor]:
    """r, z, k, v, a, b as RWKV-7 makes them, and a state that is not zero."""
    generator = torch.Generator().manual_seed(100 * n_steps + n)
    x = torch.randn(6, batch, n_steps, n_head, n, generator=generator, dtype=torch.float64)
    r, z, k, v, kk, rate = x
    kk = normalize(kk, dim=-1)
    state = torch.randn(batch, n_head, n, n, generator=generator, dtype=torch.float64)
    inputs = [y.to(dtype) for y in (r, 2 * z + z_shift, k, v, -kk, kk * torch.sigmoid(rate))]
    return inputs, state.to(torch.float64 if dtype == torch.float64 else torch.float32)


def odd_starts(n_steps: int, batch: int = 2) -> Tensor:
    """Documents that begin at odd places, two in a row, at the very first and the last step."""
    start = torch.zeros(batch, n_steps, dtype=torch.bool)
    for row, places in enumerate(((0, 5, 6, 33), (3, 15, 31, 100, n_steps - 1))):
        start[row % batch, [p for p in places if 0 <= p < n_steps]] = True
    return start


def run(function, inputs: list[Tensor], state: Tensor, seq_start: Tensor | None, weights: list[Tensor]):
    """y, the last state, and the gradients of sum(y * weights[0]) + sum(last * weights[1])."""
    leaves = [x.detach().clone().requires_grad_() for x in (*inputs, state)]
    y, last = function(*leaves, seq_start)
    weights = [weights[0].to(y.dtype), weights[1].to(last.dtype)]
    grads = torch.autograd.grad([y, last], leaves, weights, materialize_grads=True)  # T = 0 uses no input
    return [y.detach(), last.detach(), *grads]


def make_weights(inputs: list[Tensor], state: Tensor) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(x.shape, generator=generator).to(x.dtype) for x in (inputs[3], state)]


def assert_close(mine: list[Tensor], other: list[Tensor], tolerance: float) -> None:
    """Relative error in norm of every tensor of `run`. The gradient of z may be an exact zero: then its error is
    measured against 1% of the largest norm."""
    floor = 0.01 * max(float(y.double().norm()) for y in other) + 1e-30
    for name, x, y in zip(NAMES, mine, other, strict=True):
        error = (x.double() - y.double()).norm() / y.double().norm().clamp(min=floor)
        assert error <= tolerance, f"{name}: relative error {error:.1e}"  # also fails on NaN


def assert_matches_reference(function, inputs, state, seq_start) -> None:
    weights = make_weights(inputs, state)
    mine = run(function, inputs, state, seq_start, weights)
    exact = run(wkv7_reference, [x.double() for x in inputs], state.double(), seq_start, weights)
    leaves = [*inputs, state]
    assert [x.dtype for x in mine] == [inputs[3].dtype, state.dtype, *(x.dtype for x in leaves)]
    tolerance = TOLERANCE[inputs[3].dtype]
    assert_close(mine, exact, tolerance)
    # The states are fp32 whatever the inputs are.
    assert_close([mine[1]] * 9, [exact[1]] * 9, min(tolerance, TOLERANCE[torch.float32]))
    assert_close([mine[8]] * 9, [exact[8]] * 9, min(tolerance, TOLERANCE[torch.float32]))
