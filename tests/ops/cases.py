"""WKV-6 and WKV-7 for tests that are the same for both: their inputs, and the comparison with the reference."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from rwkv_miss.ops import wkv6, wkv7
from rwkv_miss.ops.wkv6_reference import wkv6_reference
from rwkv_miss.ops.wkv7_reference import wkv7_reference

# Largest relative error in norm, by the inputs' dtype: a few roundings of the sums, or in bfloat16 the rounding of the
# results that have that dtype.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 6e-3}


@dataclass(frozen=True)
class WkvCase:
    """A WKV op and how it is tested.

    Args:
        inputs: the names of the op's inputs, one letter each, in the order of its arguments.
        op: the public function.
        reference: its definition.
        draw: (generator, (B, T, H, N)) -> the inputs in float64.
        floor: a result whose norm is below this part of the largest result's is compared as if it had that norm, so
            that gradients which nearly vanish are not held to more digits than they have.
    """

    inputs: str
    op: Callable
    reference: Callable
    draw: Callable[[torch.Generator, tuple[int, int, int, int]], list[Tensor]]
    floor: float

    @property
    def name(self) -> str:
        return self.op.__name__

    @property
    def results(self) -> tuple[str, ...]:
        """The names of what `run` returns."""
        return "y", "last state", *(f"d{x}" for x in self.inputs), "dstate"

    def with_backend(self, name: str) -> Callable:
        return functools.partial(self.op, backend=name)

    def make_inputs(
        self, n_steps: int, n: int, dtype: torch.dtype = torch.float32, batch: int = 2, n_head: int = 2
    ) -> tuple[list[Tensor], Tensor]:
        """The inputs (B, T, H, N), of WKV-6's u (H, N), and a first state (B, H, N, N) that is not zero."""
        generator = torch.Generator().manual_seed(100 * n_steps + n)
        inputs = [x.to(dtype) for x in self.draw(generator, (batch, n_steps, n_head, n))]
        state = torch.randn(batch, n_head, n, n, generator=generator, dtype=torch.float64)
        return inputs, state.to(torch.float64 if dtype == torch.float64 else torch.float32)

    def make_weights(self, inputs: list[Tensor], state: Tensor) -> list[Tensor]:
        """Gradients of y and of the last state, for `run`."""
        generator = torch.Generator().manual_seed(7)
        return [torch.randn(x.shape, generator=generator).to(x.dtype) for x in (inputs[0], state)]

    def assert_close(self, mine: list[Tensor], other: list[Tensor], tolerance: float) -> None:
        """Compares two results of `run`: the relative error in norm of each tensor is at most `tolerance`."""
        floor = self.floor * max(float(y.double().norm()) for y in other)
        for name, x, y in zip(self.results, mine, other, strict=True):
            error = (x.double() - y.double()).norm()
            bound = tolerance * max(float(y.double().norm()), floor) + 1e-35  # 1e-35: fp32 may underflow
            assert error <= bound, f"{name}: error {error:.1e} above {bound:.1e}"  # also fails on NaN

    def assert_matches_reference(
        self,
        function: Callable,
        inputs: list[Tensor],
        state: Tensor,
        seq_start: Tensor | None,
        tolerance: float | None = None,
    ) -> None:
        """Compares an implementation with the reference in float64: results, all gradients, and the dtypes of both.

        Args:
            function: (*inputs, state, seq_start) -> (y, the last state).
            tolerance: None is that of the inputs' dtype.
        """
        weights = self.make_weights(inputs, state)
        mine = run(function, inputs, state, seq_start, weights)
        exact = run(self.reference, [x.double() for x in inputs], state.double(), seq_start, weights)
        assert [x.dtype for x in mine] == [inputs[0].dtype, state.dtype, *(x.dtype for x in (*inputs, state))]
        self.assert_close(mine, exact, tolerance or TOLERANCE[inputs[0].dtype])
        if inputs[0].dtype == torch.bfloat16:  # but the states and their gradients are float32
            for x, y in ((mine[1], exact[1]), (mine[-1], exact[-1])):
                self.assert_close([x] * len(mine), [y] * len(mine), TOLERANCE[torch.float32])

    def opcheck(self, backend: str, inputs: list[Tensor], state: Tensor, seq_start: Tensor) -> None:
        """Runs torch.library's own checks of a backend's operators: schema, fake and autograd parts, torch.compile."""
        forward = getattr(torch.ops.rwkv_miss, f"{self.name}_{backend}")
        backward = getattr(torch.ops.rwkv_miss, f"{self.name}_{backend}_backward")
        leaves = [x.clone().requires_grad_() for x in (*inputs, state)]
        torch.library.opcheck(forward.default, (*leaves, seq_start, True))
        torch.library.opcheck(forward.default, (*inputs, state, None, False))
        y, last, *saved = forward(*inputs, state, seq_start, True)
        for grads in ((y, last), (None, None)):
            torch.library.opcheck(backward.default, (*inputs, seq_start, *saved, *grads))


def run(
    function: Callable, inputs: list[Tensor], state: Tensor, seq_start: Tensor | None, weights: list[Tensor]
) -> list[Tensor]:
    """Runs an implementation forward and backward.

    Args:
        function: (*inputs, state, seq_start) -> (y, the last state).
        weights: the gradients of y and of the last state.

    Returns:
        y, the last state, the gradient of each input, and that of the first state.
    """
    leaves = [x.detach().clone().requires_grad_() for x in (*inputs, state)]
    y, last = function(*leaves, seq_start)
    weights = [weights[0].to(y.dtype), weights[1].to(last.dtype)]
    grads = torch.autograd.grad([y, last], leaves, weights, materialize_grads=True)  # with T = 0 no input is used
    return [y.detach(), last.detach(), *grads]


def odd_starts(n_steps: int, batch: int = 2) -> Tensor:
    """seq_start (B, T) with documents that begin at odd places, among them two neighbouring steps, the first step and
    the last."""
    start = torch.zeros(batch, n_steps, dtype=torch.bool)
    for row, places in enumerate(((0, 5, 6, 33), (3, 15, 31, 100, n_steps - 1))):
        start[row % batch, [p for p in places if 0 <= p < n_steps]] = True
    return start


def _draw6(generator: torch.Generator, shape: tuple[int, int, int, int]) -> list[Tensor]:
    """Inputs of WKV-6 with decays from 0 (w up to 6) to nearly 1 (w down to -8)."""
    r, k, v, w = torch.randn(4, *shape, generator=generator, dtype=torch.float64)
    u = torch.randn(shape[2:], generator=generator, dtype=torch.float64)
    return [r, k, v, (3 * w - 2).clamp(-8, 6), u]


def _draw7(generator: torch.Generator, shape: tuple[int, int, int, int]) -> list[Tensor]:
    """Inputs of WKV-7 as the model makes them: a = -kk and b = kk * rate with kk of norm 1 and rate below 1."""
    r, z, k, v, kk, rate = torch.randn(6, *shape, generator=generator, dtype=torch.float64)
    kk = normalize(kk, dim=-1)
    return [r, 2 * z, k, v, -kk, kk * torch.sigmoid(rate)]


WKV6 = WkvCase("rkvwu", wkv6, wkv6_reference, _draw6, floor=0.0)
WKV7 = WkvCase("rzkvab", wkv7, wkv7_reference, _draw7, floor=0.01)
