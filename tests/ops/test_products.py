"""Products of rows with matrices of their own."""

from __future__ import annotations

import pytest
import torch

from rwkv_miss.ops import products
from rwkv_miss.ops.products import add_products

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2**-8}


@pytest.fixture(params=["compiled", "no compiler", "as on a GPU"])
def add(request, monkeypatch):
    """`add_products` in each of its ways."""
    if request.param == "no compiler":
        monkeypatch.setattr(products.kernel, "library_or_reason", lambda source: (None, "there is no compiler"))
    return products._add_at_once if request.param == "as on a GPU" else add_products


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("slots", "T", "k", "n"),
    [([0], 1, 4, 70), ([3, 0, 3, 2], 1, 7, 32), ([1, 1], 1, 3, 5), ([2, 0, 1, 1, 3], 5, 6, 9), ([], 1, 4, 8)],
)
def test_in_float64(dtype, slots, T, k, n, threads, add, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    rng = torch.Generator().manual_seed(0)
    y, x, stack = (torch.randn(*shape, generator=rng).to(dtype) for shape in ((7, T, n), (7, T, k), (4, k, n)))
    rows = torch.randperm(7, generator=rng)[: len(slots)]
    expected, scale = y.double(), y.double().abs()
    for row, slot in zip(rows, slots, strict=True):
        expected[row] += x[row].double() @ stack[slot].double()
        scale[row] += x[row].double().abs() @ stack[slot].double().abs()  # of the sums' rounding
    strided = torch.cat([x, x], 1)[:, :T]
    untouched = y[[row for row in range(7) if row not in rows.tolist()]].clone()
    add(y, strided, stack, rows, torch.tensor(slots, dtype=torch.int64))
    assert ((y.double() - expected).abs() <= 2 * TOLERANCE[dtype] * scale).all()
    assert torch.equal(y[[row for row in range(7) if row not in rows.tolist()]], untouched)


def test_compiled_code_rounds_once():
    """A sum of bf16 numbers that is exact in fp32."""
    x, stack = torch.ones(1, 1, 4).bfloat16(), torch.tensor([256.0, 1.0, 1.0, -256.0]).bfloat16().view(1, 4, 1)
    y, first = torch.ones(1, 1, 1).bfloat16(), torch.zeros(1, dtype=torch.int64)
    assert products._in_cpp(x)
    add_products(y, x, stack, first, first)
    assert y.item() == 3.0
