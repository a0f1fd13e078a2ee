"""Sums over blocks of columns, with and without a compiler."""

from __future__ import annotations

import pytest
import torch

from rwkv_miss.ops import blocks
from rwkv_miss.ops.blocks import add_to_blocks, block_sum

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2**-8}


@pytest.fixture(params=[True, False], ids=["compiled", "no compiler"])
def compiled(request, monkeypatch) -> bool:
    if not request.param:
        monkeypatch.setattr(blocks.kernel, "library_or_reason", lambda source: (None, "there is no compiler"))
    return request.param


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("M", "n", "r"), [(5, 64, 16), (7, 50, 16), (3, 9, 9), (1, 40, 1), (0, 8, 4), (33, 130, 64)])
def test_in_float64(dtype, M, n, r, compiled):
    rng = torch.Generator().manual_seed(0)
    x, block = torch.randn(M, n, generator=rng).to(dtype), torch.randn(M, r, generator=rng).to(dtype)
    S = torch.zeros(M, r, dtype=torch.float64)
    for c in range(n):
        S[:, c % r] += x[:, c].double()
    scale = x.double().abs().sum(1, keepdim=True)  # of the sums' rounding
    found = block_sum(x, r)
    assert found.dtype == dtype and (((found.double() - S).abs() <= TOLERANCE[dtype] * scale).all())
    strided = torch.cat([x, x], 1)[:, :n]
    assert torch.equal(block_sum(strided, r), found)

    expected = (x.double() + block.double()[:, torch.arange(n) % r]).to(dtype)  # exact before it is rounded, or nearly
    out = torch.empty_like(x)
    assert add_to_blocks(x, block, out=out) is out
    torch.testing.assert_close(out, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert add_to_blocks(x, block) is x and torch.equal(x, out)


def test_compiled_code_rounds_once():
    """A sum of bf16 numbers that is exact in fp32, in one block and in the rest."""
    x = torch.tensor([[256.0, 1.0, 1.0, -256.0, 1.0]]).bfloat16()
    assert blocks._in_cpp(x) and block_sum(x, 1).item() == 3.0
    assert block_sum(x, 2).tolist() == [[258.0, -255.0]]
