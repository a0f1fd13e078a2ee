"""Rounding of fp32 to bf16."""

from __future__ import annotations

import pytest
import torch

from rwkv_miss.merging import rounding
from rwkv_miss.merging.rounding import round_into

BF16 = torch.bfloat16


def stochastic(x: torch.Tensor) -> torch.Tensor:
    out = torch.empty(x.shape, dtype=BF16)
    round_into(out, x, x, "stochastic", torch.Generator().manual_seed(0))
    return out


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_stochastic_rounding_goes_up_as_often_as_it_should(sign, share):
    step = 2**-7  # of bf16 between 1 and 2
    out = stochastic(torch.full((100_000,), sign * (1 + share * step)))
    assert set(out.float().tolist()) <= {sign * 1.0, sign * (1 + step)}
    assert (out.float() != sign).double().mean().item() == pytest.approx(share, abs=0.006)  # 4 standard deviations


def test_what_bf16_can_hold_is_kept():
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)).bfloat16()
    x[:5] = torch.tensor([0.0, -0.0, 2.0**-133, float("inf"), torch.finfo(BF16).max])
    assert torch.equal(stochastic(x.float()), x)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32])
def test_nearest_is_torchs(dtype, compiled, monkeypatch):
    """Also halfway between two values, beyond the largest one, where nothing is finite, and for sizes that fill no
    block; with and without a compiler."""
    if not compiled:
        monkeypatch.setattr(rounding.kernel, "library_or_reason", lambda source: (None, "there is no compiler"))
    rng = torch.Generator().manual_seed(0)
    for n in (1, 15, 17, 1023, 5000):
        x, delta = torch.randn(n, generator=rng), torch.randn(n, generator=rng)
        x[: n // 2] = (x[: n // 2].view(torch.int32) & -(2**16) | 2**15).view(torch.float32)  # halfway in bf16
        out = torch.empty(n, dtype=dtype)
        squares = round_into(out, x, delta, "nearest", rng)
        assert torch.equal(out, x.to(dtype))
        assert squares.delta == pytest.approx(delta.double().square().sum().item(), rel=1e-6)
        assert squares.lost == pytest.approx((x.to(dtype).double() - x.double()).square().sum().item(), rel=1e-6)
    x[:4] = torch.tensor([float("nan"), float("inf"), torch.finfo(torch.float32).max, -float("inf")])
    assert not torch.tensor(round_into(out, x, delta, "nearest", rng).lost).isfinite()
    assert torch.equal(out, x.to(dtype)) or (out[0].isnan() and torch.equal(out[1:], x[1:].to(dtype)))
