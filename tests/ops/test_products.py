"""Products of single rows, low-rank ones too, and of rows with matrices of their own."""

from __future__ import annotations

import pytest
import torch

from rwkv_miss.benchmarks.common import threads as thread_count
from rwkv_miss.ops import products
from rwkv_miss.ops.low_rank import LowRank, low_rank
from rwkv_miss.ops.products import add_products, linear

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
    assert products._in_cpp(x.dtype)
    add_products(y, x, stack, first, first)
    assert y.item() == 3.0


@pytest.fixture(params=["compiled", "no compiler"])
def each_way(request, monkeypatch):
    if request.param == "no compiler":
        monkeypatch.setattr(products.kernel, "library_or_reason", lambda source: (None, "there is no compiler"))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("k", "n"), [(64, 32), (37, 5), (3, 70), (100, 1)])
def test_a_row_times_a_weight_in_float64(dtype, k, n, threads, each_way, poisoned):
    rng = torch.Generator().manual_seed(0)
    x, weight = torch.randn(1, 1, 2 * k, generator=rng).to(dtype), torch.randn(n, 2 * k, generator=rng).to(dtype)
    x, weight = x[..., ::2], weight[:, ::2]  # not contiguous
    with torch.no_grad(), thread_count(threads):
        y = linear(x, weight)
    scale = x.double().abs() @ weight.double().abs().T
    assert y.shape == (1, 1, n) and y.dtype == dtype
    assert ((y.double() - x.double() @ weight.double().T).abs() <= 2 * TOLERANCE[dtype] * scale).all()


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("k", "ranks", "n"), [(64, (16, 32, 8), 96), (37, (1, 7, 4), 5), (2, (3, 3, 3), 33)])
def test_low_rank_products_in_float64(dtype, k, ranks, n, threads, each_way, poisoned):
    rng = torch.Generator().manual_seed(0)
    parts, expected = [], []
    activations = {"tanh": torch.tanh, "none": lambda h: h, "sigmoid": lambda h: 1 / (1 + torch.exp(-h))}
    for i, (rank, (name, activation)) in enumerate(zip(ranks, activations.items(), strict=True)):
        shapes = (1, 1, k), (k, rank), (rank, n), (1, 1, n)
        x, first, second, bias = (torch.randn(shape, generator=rng).div(2).to(dtype) for shape in shapes)
        parts.append(LowRank(x, first, second, bias if i else None, name))
        h = activation(x.double() @ first.double())
        expected.append(h @ second.double() + (bias.double() if i else 0))
    with torch.no_grad(), thread_count(threads):
        found = low_rank(parts)
    for y, exact in zip(found, expected, strict=True):
        assert y.shape == (1, 1, n) and y.dtype == dtype
        assert (y.double() - exact).abs().max() <= 4 * TOLERANCE[dtype] * exact.abs().max()


def test_a_row_has_gradients_where_they_are_asked_for():
    rng = torch.Generator().manual_seed(0)
    x, a, b = (torch.randn(shape, generator=rng, requires_grad=True) for shape in ((1, 1, 6), (6, 2), (2, 6)))
    (linear(x, b.T @ a.T) + low_rank([LowRank(x, a, b, None, "none")])[0]).sum().backward()
    expected = torch.autograd.grad((2 * x @ a @ b).sum(), (x, a, b))
    assert all(torch.allclose(y.grad, z, atol=1e-5) for y, z in zip((x, a, b), expected, strict=True))
