"""Rounding of fp32 to bf16."""

from __future__ import annotations

import pytest
import torch

from rwkv_miss.rounding import round_into


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_stochastic_rounding_goes_up_as_often_as_it_should(sign, share):
    step = 2**-7  # of bf16 between 1 and 2
    x = torch.full((100_000,), sign * (1 + share * step))
    out = torch.empty(len(x), dtype=torch.bfloat16)
    round_into(out, x, "stochastic", torch.Generator().manual_seed(0))
    assert set(out.float().tolist()) <= {sign * 1.0, sign * (1 + step)}
    assert (out.float() != sign).double().mean().item() == pytest.approx(share, abs=0.006)  # 4 standard deviations


def test_what_bf16_can_hold_is_kept():
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)).bfloat16()
    x[:5] = torch.tensor([0.0, -0.0, 2.0**-133, float("inf"), torch.finfo(torch.bfloat16).max])
    out = torch.empty_like(x)
    round_into(out, x.float(), "stochastic", torch.Generator().manual_seed(0))
    assert torch.equal(out, x)


def test_nearest_is_torchs():
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    out = torch.empty(1000, dtype=torch.bfloat16)
    round_into(out, x, "nearest", torch.Generator())
    assert torch.equal(out, x.bfloat16())
