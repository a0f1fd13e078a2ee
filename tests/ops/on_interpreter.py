"""The "fla" backend with fla-core's own kernels, which Triton's interpreter runs on CPU tensors. test_fla.py runs this
file, in a process of its own."""

from __future__ import annotations

import pytest
import torch

from rwkv_miss.ops import fla
from tests.ops.cases import WKV6, WKV7, odd_starts, run
from tests.ops.triton_interpreter import prepare

FP32, BF16 = torch.float32, torch.bfloat16
# RWKV-6 loses digits in float32 to differences of sums of logarithms: its decays reach e^-403, and the sums 1e3 and
# more.
TOLERANCE = {(WKV6, FP32): 5e-5, (WKV7, FP32): 2e-6, (WKV6, BF16): 6e-3, (WKV7, BF16): 6e-3}
prepare()


@pytest.fixture(autouse=True)
def cpu_is_a_gpu(monkeypatch):
    monkeypatch.setattr(fla, "DEVICES", ("cpu",))


# The kernels work in chunks of 64 steps (16 for RWKV-7 in float32) and pad the head size to a power of 2.
@pytest.mark.parametrize(
    ("n_steps", "n", "dtype", "starts"),
    [(1, 16, FP32, False), (17, 64, FP32, False), (33, 24, FP32, True), (70, 16, BF16, True), (17, 32, BF16, False)],
)
def test_matches_reference(wkv, n_steps, n, dtype, starts):
    inputs, state = wkv.make_inputs(n_steps, n, dtype, batch=2 if starts else 1, n_head=1 if starts else 2)
    seq_start = odd_starts(n_steps) if starts else None
    weights = wkv.make_weights(inputs, state)
    mine = run(wkv.with_backend("fla"), inputs, state, seq_start, weights)
    exact = run(wkv.reference, [x.double() for x in inputs], state.double(), seq_start, weights)
    assert [x.dtype for x in mine] == [dtype, FP32, *[dtype] * len(inputs), FP32]
    assert mine[0].is_contiguous()
    wkv.assert_close(mine, exact, TOLERANCE[wkv, dtype])


def test_decays_of_zero():
    inputs, state = WKV6.make_inputs(40, 16, batch=1)
    inputs[3][:, ::3] = torch.tensor([5.0, 60.0, 90.0, 1e4] * 4)  # exp(90) is infinite in float32
    weights = WKV6.make_weights(inputs, state)
    mine = run(WKV6.with_backend("fla"), inputs, state, None, weights)
    exact = run(WKV6.reference, [x.double() for x in inputs], state.double(), None, weights)
    dw = mine[WKV6.results.index("dw")]
    assert dw.isfinite().all() and (dw[:, ::3] == 0).all()
    WKV6.assert_close(mine, exact, 5e-4)


@pytest.mark.parametrize(("z", "dtype", "n_steps"), [(100.0, FP32, 18), (100.0, BF16, 66), (-100.0, BF16, 66)])
def test_strongest_and_weakest_decay(z, dtype, n_steps):
    inputs, state = WKV7.make_inputs(n_steps, 16, dtype, batch=1, n_head=1)
    inputs[1] = torch.full_like(inputs[1], z)
    weights = WKV7.make_weights(inputs, state)
    mine = run(WKV7.with_backend("fla"), inputs, state, None, weights)
    exact = run(WKV7.reference, [x.double() for x in inputs], state.double(), None, weights)
    WKV7.assert_close(mine, exact, TOLERANCE[WKV7, dtype])


@pytest.mark.parametrize("arrives", [0, 1])
def test_gradient_at_only_one_output(wkv, arrives):
    inputs, state = wkv.make_inputs(7, 16, batch=1, n_head=1)
    grads = []
    for backend in ("reference", "fla"):
        leaves = [x.clone().requires_grad_() for x in (*inputs, state)]
        output = wkv.op(*leaves, backend=backend)[arrives]
        grads.append(torch.autograd.grad(output.square().sum(), leaves, materialize_grads=True))
    for exact, mine in zip(*grads, strict=True):
        assert (mine - exact).norm() <= TOLERANCE[wkv, FP32] * exact.norm()


def test_what_is_not_finite_ends_with_its_document(wkv):
    inputs, state = wkv.make_inputs(20, 16, batch=1, n_head=1)
    start = torch.zeros(1, 20, dtype=torch.bool)
    start[0, 18] = True
    y, last = wkv.op(*inputs, torch.full_like(state, float("nan")), start, backend="fla")
    assert y[:, :18].isnan().all() and y[:, 18:].isfinite().all() and last.isfinite().all()


def test_no_steps_return_a_copy_of_the_state(wkv):
    inputs, state = wkv.make_inputs(0, 16)
    weights = wkv.make_weights(inputs, state)
    y, last, *grads, dstate = run(wkv.with_backend("fla"), inputs, state, odd_starts(0), weights)
    assert y.shape == (2, 0, 2, 16)
    assert torch.equal(last, state) and torch.equal(dstate, weights[1]) and not any(x.any() for x in grads)
    assert wkv.op(*inputs, state, backend="fla")[1].data_ptr() != state.data_ptr()
