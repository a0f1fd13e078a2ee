"""The loss computed in pieces equals the loss computed at once, and positions without loss have no part in it."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from rwkv_miss.benchmarks.common import threads
from rwkv_miss.ops import log_probs
from rwkv_miss.ops.log_probs import target_log_probs
from rwkv_miss.planning.live import Live
from rwkv_miss.planning.step import WithoutValues

V = 11


@pytest.fixture(params=[True, False], ids=["compiled", "no compiler"], autouse=True)
def compiled(request, monkeypatch) -> bool:
    if not request.param:
        monkeypatch.setattr(log_probs.kernel, "library_or_reason", lambda source: (None, "there is no compiler"))
    return request.param


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """hidden (2, 9, 5), weight (V, 5), and targets, of which every third is missing."""
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 9, 5, generator=g).to(dtype).requires_grad_()
    weight = torch.randn(V, 5, generator=g).to(dtype).requires_grad_()
    targets = torch.randint(V, (2, 9), generator=g)
    targets[:, ::3] = -100
    return hidden, weight, targets


def at_once(hidden: Tensor, weight: Tensor, targets: Tensor, reduction: str) -> Tensor:
    """What is expected, in float64."""
    logits = (hidden.double() @ weight.double().T).flatten(0, 1)
    found = -cross_entropy(logits, targets.flatten(), reduction=reduction, ignore_index=-100)
    return found if reduction == "sum" else found.view(targets.shape)


@pytest.mark.parametrize("trained", [(0,), (1,), (0, 1)])
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("max_logits", [V * 4, V, 1, 2**20])
def test_pieces(monkeypatch, max_logits, reduction, trained):
    monkeypatch.setattr(log_probs, "_MAX_LOGITS", max_logits)
    *both, targets = inputs()
    for i, x in enumerate(both):
        x.requires_grad_(i in trained)
    found, exact = target_log_probs(*both, targets, reduction), at_once(*both, targets, reduction)
    torch.testing.assert_close(found, exact.float())
    factors = torch.randn(exact.shape, generator=torch.Generator().manual_seed(1))
    wanted = [both[i] for i in trained]
    mine, theirs = (torch.autograd.grad(x, wanted, factors.to(x.dtype)) for x in (found, exact))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_float64_stays_float64():
    hidden, weight, targets = inputs(torch.float64)
    found, exact = target_log_probs(hidden, weight, targets), at_once(hidden, weight, targets, "sum")
    torch.testing.assert_close(found, exact, rtol=1e-14, atol=0)


def test_bf16_loses_no_more_than_its_products():
    """Against float64 on the same weights: log p from logits of 8 bits, gradients rounded once or twice."""
    hidden, weight, targets = inputs(torch.bfloat16)
    found, exact = target_log_probs(hidden, weight, targets), at_once(hidden, weight, targets, "sum")
    assert found.dtype == torch.float32 and abs(found - exact) <= 2e-3 * abs(exact)
    for x, y in zip(*(torch.autograd.grad(x / 12, (hidden, weight)) for x in (found, exact)), strict=True):
        assert (x - y).norm() <= 1e-2 * y.norm()


def test_only_positions_with_a_target_are_computed(monkeypatch):
    hidden, weight, targets = inputs()
    with torch.no_grad():
        hidden[:, ::3] = torch.nan
    found = target_log_probs(hidden, weight, targets)
    [gradient] = torch.autograd.grad(found, hidden)
    assert found.isfinite() and gradient.isfinite().all() and not gradient[:, ::3].any()


def test_without_gradients_there_is_no_graph():
    hidden, weight, targets = inputs()
    with torch.no_grad():
        assert not target_log_probs(hidden, weight, targets).requires_grad


def test_no_loss_at_all_is_zero_with_a_gradient_of_zeros():
    hidden = torch.randn(1, 3, 5, requires_grad=True)
    found = target_log_probs(hidden, torch.ones(7, 5), torch.full((1, 3), -100))
    assert found == 0
    assert not torch.autograd.grad(found, hidden)[0].any()


def in_place(logits: Tensor, *arguments) -> Tensor:
    """log p of the targets from the logits, which it replaces by the gradient if that is wanted."""
    return (log_probs._log_probs_in_cpp if log_probs._in_cpp(logits) else log_probs._log_probs)(logits, *arguments)


@pytest.mark.parametrize("scale", [1, 100])
@pytest.mark.parametrize("n", [1, 50, 64, 1000, 4133])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_logits_in_float64(dtype, n, scale):
    """Any number of columns, in whole vectors or not; probabilities that fp32 holds, and those that vanish in it."""
    g = torch.Generator().manual_seed(n)
    logits = (scale * torch.randn(5, n, generator=g)).to(dtype)
    wanted, factors = torch.randint(n, (5,), generator=g), torch.tensor([1.0, -0.3, 0.0, 7.0, 1e-4])
    wanted[1] = logits[1].argmax()
    exact = logits.double().requires_grad_()
    expected = -cross_entropy(exact, wanted, reduction="none")
    with threads(2):
        for weights in (factors, None):
            found, gradient = in_place(logits, wanted, weights, False), logits.clone()
            assert torch.equal(in_place(gradient, wanted, weights, True), found)
            torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)
            of_rows = torch.ones(5) if weights is None else weights
            [right] = torch.autograd.grad(expected, exact, of_rows.double(), retain_graph=True)
            rounding = (1e-6 if dtype == torch.float32 else 2**-8) * right.abs()
            assert ((gradient.double() - right).abs() <= rounding + 1e-6 * of_rows[:, None].abs()).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_that_are_not_finite(dtype):
    """-infinity is a probability of 0; any other makes its own row NaN, whole."""
    logits = torch.zeros(5, 70, dtype=dtype)
    logits[0, ::2], logits[1, 69], logits[2, 3], logits[3] = -torch.inf, torch.nan, torch.inf, -torch.inf
    found = in_place(logits, torch.tensor([1, 2, 3, 4, 5]), None, True)
    assert found.isnan().tolist() == [False, True, True, True, False]
    torch.testing.assert_close(found[[0, 4]], -torch.tensor([35.0, 70.0]).log())
    assert logits[1:4].isnan().all() and logits[[0, 4]].isfinite().all()
    assert not logits[0, ::2].any() and (logits[0, 3::2] < 0).all()


def test_a_target_beyond_the_vocabulary_is_no_target():
    hidden, weight, targets = inputs()
    targets[0, 1] = V
    with pytest.raises((AssertionError, RuntimeError), match=r"column of the logits|out of bounds"):
        target_log_probs(hidden, weight, targets)


def test_a_second_backward_pass_is_refused():
    hidden, weight, targets = inputs()
    found = target_log_probs(hidden, weight, targets)
    torch.autograd.grad(found, hidden, 2 * torch.ones(()), retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(found, hidden)


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("n", [3, 4, 8, 13])
def test_two_pieces_on_the_meta_device_hold_what_all_do(monkeypatch, n, reduction):
    """Beside a float64 model on a CPU, which makes the same tensors."""
    monkeypatch.setattr(log_probs, "_MAX_LOGITS", V * 4)
    found = []
    for device in ("cpu", "meta"):
        hidden, weight = (torch.zeros(x, 5, dtype=torch.float64, device=device).requires_grad_() for x in (n, V))
        with Live() as live, WithoutValues() if device == "meta" else nullcontext():
            live.enter("forward")
            values = target_log_probs(hidden[None], weight, torch.zeros(1, n, dtype=int, device=device), reduction)
            live.enter("backward")
            values.sum().backward()
        found.append({phase: size for phase, (size, _) in live.peaks.items()})
    assert found[0] == found[1] and len(found[0]) == 2
