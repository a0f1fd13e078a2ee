"""MiSS's linear: outputs and gradients against the dense formula, finite differences and HF PEFT."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from rwkv_miss import AdapterConfig, ModelConfig, inject
from rwkv_miss.adapters import miss
from rwkv_miss.adapters.miss import MissLinear, _MissFunction, delta_weight, folds
from rwkv_miss.model.linear import FrozenLinear, Linear
from rwkv_miss.model.rwkv7 import RWKV7
from rwkv_miss.ops.blocks import add_to_blocks, block_sum

# (in, out, r): r divides `in` or does not; r = 1; r = `in`; r just below `in` and just above half of it.
SHAPES = [(24, 10, 6), (24, 10, 7), (10, 24, 4), (12, 5, 1), (12, 5, 12), (13, 6, 12), (13, 6, 7), (5, 3, 3)]


@pytest.fixture(params=["S D", "W + dW"])
def way(request, monkeypatch) -> str:
    """Both ways of computing the layer, whatever the number of rows."""
    monkeypatch.setattr(miss, "FOLD_FROM", 0 if request.param == "W + dW" else 2**30)
    return request.param


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def dense_delta(D: Tensor, n_in: int) -> Tensor:
    """dW[o, c] = D[c mod r, o], entry by entry."""
    r, out = D.shape
    return torch.stack([torch.stack([D[c % r, o] for c in range(n_in)]) for o in range(out)])


def frozen(W: Tensor) -> Linear:
    """A frozen linear with the weight W."""
    linear = Linear(W.shape[1], W.shape[0])
    linear.weight = nn.Parameter(W, requires_grad=False)
    return linear


def adapted(n_in: int, out: int, r: int, dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> MissLinear:
    """A linear with an adapter that is not zero."""
    layer = MissLinear(frozen(normal(out, n_in, seed=1, dtype=dtype)), (r, out), dropout)
    layer.miss_block.data.copy_(normal(r, out, seed=2))
    return layer


def run(function, x: Tensor, D: Tensor) -> list[Tensor]:
    """y, dx, dD for a fixed random dy."""
    x, D = x.detach().clone().requires_grad_(), D.detach().clone().requires_grad_()
    y = function(x, D)
    return [y.detach(), *torch.autograd.grad(y, (x, D), normal(*y.shape, seed=3, dtype=y.dtype))]


def assert_close(mine: list[Tensor], exact: list[Tensor], tolerance: float) -> None:
    for name, x, y in zip(("y", "dx", "dD"), mine, exact, strict=True):
        assert x.shape == y.shape, name
        error = (x.double() - y.double()).norm() / y.double().norm()
        assert error <= tolerance, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize(("n_in", "out", "r"), SHAPES)
def test_delta_weight(n_in, out, r):
    D = normal(r, out)
    assert torch.equal(delta_weight(D, n_in), dense_delta(D, n_in))


@pytest.mark.parametrize(("n_in", "out", "r"), SHAPES)
@pytest.mark.parametrize("lead", [(9,), (2, 5), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_outputs_and_gradients_of_the_dense_formula(n_in, out, r, lead, dtype, way):
    x, W, D = normal(*lead, n_in, dtype=dtype), normal(out, n_in, seed=1, dtype=dtype), normal(r, out, seed=2)
    D = D.to(torch.float64 if dtype == torch.float64 else torch.float32)
    mine = run(lambda x, D: _MissFunction.apply(x, frozen(W), D, None, 1.0), x, D)
    assert [t.dtype for t in mine] == [dtype, dtype, D.dtype]
    exact = run(lambda x, D: x @ (W.double() + dense_delta(D, n_in)).T, x.double(), D.double())
    assert_close(mine, exact, {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2e-2}[dtype])


@pytest.mark.parametrize(("n_in", "out", "r"), [(6, 4, 3), (7, 3, 4)])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_finite_differences(n_in, out, r, dropout, way):
    """With dropout too, for one fixed mask that is passed in."""
    W, x, D = normal(out, n_in), normal(2, 3, n_in).requires_grad_(), normal(r, out).requires_grad_()
    keep = normal(6, n_in, seed=4) > 0 if dropout else None

    def function(x: Tensor, D: Tensor) -> Tensor:
        return _MissFunction.apply(x, frozen(W), D, keep, 1 / (1 - dropout))

    assert torch.autograd.gradcheck(function, (x, D))


def test_dropout_of_the_formula_is_on_the_branch_alone(way):
    x, W, D = normal(6, 7), normal(4, 7, seed=1), normal(3, 4, seed=2)
    keep = normal(6, 7, seed=4) > 0
    mine = run(lambda x, D: _MissFunction.apply(x, frozen(W), D, keep, 2.5), x, D)
    exact = run(lambda x, D: x @ W.T + (x * keep * 2.5) @ dense_delta(D, 7).T, x, D)
    assert_close(mine, exact, 1e-14)


def test_not_contiguous_inputs(way):
    W, D = normal(4, 7, seed=1), normal(3, 4, seed=2)
    x = normal(7, 5, 2).transpose(0, 2)
    assert not x.is_contiguous()
    mine = run(lambda x, D: _MissFunction.apply(x.transpose(0, 1), frozen(W), D, None, 1.0), x, D)
    exact = run(lambda x, D: x.transpose(0, 1) @ (W + dense_delta(D, 7)).T, x, D)
    assert_close(mine, exact, 1e-14)
    expanded = normal(1, 4).expand(9, 4).clone().requires_grad_()
    _MissFunction.apply(expanded @ normal(4, 7), frozen(W), D, None, 1.0).sum().backward()  # dy has strides of 0
    exact_grad = (torch.ones(9, 4) @ (W + dense_delta(D, 7)).float()).double() @ normal(4, 7).T
    assert torch.allclose(expanded.grad, exact_grad, rtol=1e-5)


def test_block_sum_and_add_to_blocks_are_transposes():
    """<S(x), u> = <x, S^T(u)>, for every r."""
    x = normal(3, 13)
    for r in range(1, 14):
        u = normal(3, r, seed=r)
        assert torch.allclose((block_sum(x, r) * u).sum(), (x * add_to_blocks(torch.zeros(3, 13).double(), u)).sum())


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_only_the_block_sums_are_kept_for_the_backward_pass(dropout, way):
    layer = adapted(64, 40, 6, dropout)
    x = torch.randn(7, 11, 64, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    own = {p.data_ptr() for p in layer.parameters()}
    sizes = [t.numel() * t.element_size() for t in kept if t.data_ptr() not in own]
    block_sums, mask = 7 * 11 * 6 * 4, 7 * 11 * 64
    assert sorted(sizes) == sorted([block_sums, mask] if dropout else [block_sums])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n_steps", [1, 2, 33])
@pytest.mark.parametrize("r", [1, 5, 8])
def test_a_new_adapter_changes_no_bit_of_the_logits(random_weights, dtype, n_steps, r, way):
    config = ModelConfig(7, 2, 32, 2, 16, 128, 64, {"w": 5, "a": 6, "v": 3, "g": 9})
    model = RWKV7(config)
    model.load_state_dict(random_weights(n_layer=2))
    model.to(dtype)
    tokens = torch.randint(64, (2, n_steps))
    with torch.no_grad():
        before, _ = model(tokens)
        after, _ = inject(model, AdapterConfig(r=r))(tokens)
    assert torch.equal(before, after)


def test_dw_is_added_to_the_weight_for_many_rows_and_to_a_plain_weight_alone():
    class Other(FrozenLinear):
        """A linear without a weight that could be summed."""

        in_features, out_features = 64, 40

        def forward(self, x: Tensor) -> Tensor:
            return x @ W.T

    W = normal(40, 64, dtype=torch.float32)
    calls = []
    plain = frozen(W)
    plain.forward = lambda x: calls.append(len(x)) or x @ W.T
    D = normal(16, 40, seed=2, dtype=torch.float32)
    x = normal(512, 64, dtype=torch.float32)
    for linear in (plain, Other()):
        for rows in (511, 512):
            y = _MissFunction.apply(x[:rows], linear, D, None, 1.0)
            assert torch.allclose(y, x[:rows] @ (W + dense_delta(D, 64)).T, atol=1e-3)
            assert folds(linear, rows, 16) == (linear is plain and rows == 512)
    assert calls == [511]


def test_dropout_is_for_training_alone():
    layer = adapted(32, 8, 4, dropout=0.25)
    x = torch.randn(5, 32)
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    layer.train()
    torch.manual_seed(0)
    first = layer(x)
    assert not torch.equal(first, layer(x))
    torch.manual_seed(0)
    assert torch.equal(first, layer(x))


def test_dropout_drops_its_share_and_keeps_the_mean():
    """With W = 0, r = 1 and D = 1, y is the sum of x after dropout: for ones, 4/3 times the number kept."""
    layer = MissLinear(frozen(torch.zeros(1, 400)), (1, 1), dropout=0.25)
    layer.miss_block.data.fill_(1)
    torch.manual_seed(0)
    kept = layer(torch.ones(1000, 400)).flatten() * 0.75
    assert abs(kept.mean() - 300) < 4 * (400 * 0.25 * 0.75 / 1000) ** 0.5
    assert abs(kept.var() - 400 * 0.25 * 0.75) < 15  # elements are dropped one by one, not in blocks


@pytest.mark.parametrize(("n_in", "out", "r"), SHAPES)
@pytest.mark.parametrize("lead", [(9,), (2, 5)])
def test_hf_peft(n_in, out, r, lead):
    peft_miss = pytest.importorskip("peft.tuners.miss")
    layer = adapted(n_in, out, r)
    linear = nn.Linear(n_in, out, bias=False)
    linear.weight.data = layer.base_layer.weight.data
    theirs = peft_miss.MissLinear(linear, "default", r=r, config=peft_miss.MissConfig(r=r))
    theirs.miss_block["default"].data.copy_(layer.miss_block.data)
    x = torch.randn(*lead, n_in)
    dy = torch.randn(*lead, out)
    results = []
    for module, D in ((layer, layer.miss_block), (theirs, theirs.miss_block["default"])):
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        results.append([y.detach(), *torch.autograd.grad(y, (leaf, D), dy)])
    assert_close(*results, 1e-6)


def test_dtypes_of_the_adapter():
    """fp32 beside bf16 weights, so that small updates are not lost; float64 beside float64."""
    for weight, block in {
        torch.bfloat16: torch.float32,
        torch.float32: torch.float32,
        torch.float64: torch.float64,
    }.items():
        layer = MissLinear(frozen(torch.zeros(3, 4, dtype=weight)), (2, 3), 0.0)
        assert (layer.base_layer.weight.dtype, layer.miss_block.dtype) == (weight, block)
        assert layer.miss_block.requires_grad and torch.count_nonzero(layer.miss_block) == 0
        assert set(layer.state_dict()) == {"base_layer.weight", "miss_block"}


def test_the_papers_number_of_parameters():
    """RWKV-7 3B at r = 64: 47.2M trainable (arXiv 2409.15371, tables of RWKV)."""
    low_rank = {"w": 96, "a": 96, "v": 64, "g": 320}
    with torch.device("meta"):
        model = RWKV7(ModelConfig(7, 32, 2560, 40, 64, 10240, 65536, low_rank))
        inject(model, AdapterConfig(r=64))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert f"{trained / 1e6:.1f}M" == "47.2M"
