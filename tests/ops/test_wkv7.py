"""The WKV-7 op: the reference against its definition written otherwise, every backend against the reference."""

from __future__ import annotations

import functools
import logging

import numpy as np
import pytest
import torch
from wkv7_cases import assert_close, assert_matches_reference, make_inputs, make_weights, odd_starts, run

from rwkv_miss.errors import UserError
from rwkv_miss.ops import BACKENDS, wkv7
from rwkv_miss.ops.arguments import announce
from rwkv_miss.ops.cpu import wkv7 as cpu_wkv7

FAST = ("torch", "cpu")


def with_backend(name: str):
    return functools.partial(wkv7, backend=name)


@pytest.fixture
def poisoned():
    """torch.empty and its kin return NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def test_the_reference_is_the_product_of_dense_transition_matrices():
    inputs, state = make_inputs(9, 6, torch.float64, batch=1, n_head=1)
    start = torch.zeros(1, 9, dtype=torch.bool)
    start[0, 4] = True
    y, last = wkv7(*inputs, state, start, backend="reference")
    r, z, k, v, a, b = (x[0, :, 0].numpy() for x in inputs)
    # Row by row of the state: s_t = s_{t-1} M_t + v_t k_t^T with M_t = diag(d_t) + a_t b_t^T.
    matrices = [np.diag(np.exp(-np.exp(-0.5) / (1 + np.exp(-z[t])))) + np.outer(a[t], b[t]) for t in range(9)]
    for t in range(9):
        first = 4 if t >= 4 else 0
        total = np.zeros((6, 6)) if t >= 4 else state[0, 0].numpy()
        if t < 4:
            total = total @ np.linalg.multi_dot([*matrices[: t + 1], np.eye(6)])
        for s in range(first, t + 1):
            term = np.outer(v[s], k[s])
            total = total + functools.reduce(np.matmul, matrices[s + 1 : t + 1], term)
        np.testing.assert_allclose(y[0, t, 0].numpy(), total @ r[t], rtol=1e-12)
    np.testing.assert_allclose(last[0, 0].numpy(), total, rtol=1e-12)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_gradients_are_those_of_finite_differences(backend):
    inputs, state = make_inputs(19, 3, torch.float64, batch=1, n_head=1)
    start = torch.zeros(1, 19, dtype=torch.bool)
    start[0, 7] = True
    leaves = [x.requires_grad_() for x in (*inputs, state)]
    assert torch.autograd.gradcheck(lambda *x: wkv7(*x, start, backend=backend), leaves)


@pytest.mark.parametrize("starts", [False, True])
@pytest.mark.parametrize("n", [5, 8, 16, 24, 32, 64, 128])
@pytest.mark.parametrize("n_steps", [1, 15, 16, 17, 257])
@pytest.mark.parametrize("backend", FAST)
def test_backend_matches_reference(backend, n_steps, n, starts, poisoned):
    inputs, state = make_inputs(n_steps, n, n_head=1 if n_steps == 257 else 3)
    assert_matches_reference(with_backend(backend), inputs, state, odd_starts(n_steps) if starts else None)


@pytest.mark.parametrize("n_steps", [1, 17, 257])
@pytest.mark.parametrize("n", [5, 64])
@pytest.mark.parametrize("backend", FAST)
def test_backend_matches_reference_in_bf16(backend, n, n_steps, poisoned):
    inputs, state = make_inputs(n_steps, n, torch.bfloat16)
    assert_matches_reference(with_backend(backend), inputs, state, odd_starts(n_steps))


def test_torch_matches_reference_in_float64(poisoned):
    inputs, state = make_inputs(257, 16, torch.float64)
    assert_matches_reference(with_backend("torch"), inputs, state, odd_starts(257))


# At 6 the gradient of z is small but not lost; at 100 and -100 the sigmoid is exactly 1, or almost 0.
@pytest.mark.parametrize("z_shift", [100.0, 6.0, -6.0, -100.0])
@pytest.mark.parametrize("backend", FAST)
def test_strongest_and_weakest_decay(backend, z_shift, poisoned):
    inputs, state = make_inputs(100, 32, z_shift=z_shift)
    assert_matches_reference(with_backend(backend), inputs, state, odd_starts(100))


@pytest.mark.parametrize("backend", FAST)
def test_inputs_that_are_not_contiguous(backend):
    inputs, state = make_inputs(20, 8)
    start = odd_starts(20)
    weights = make_weights(inputs, state)
    expected = run(with_backend(backend), inputs, state, start, weights)

    def strided(*leaves):
        *tensors, state, start = leaves
        tensors = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors]
        assert not tensors[0].is_contiguous()
        start = start.t().contiguous().t()
        return wkv7(*tensors, state.mT.contiguous().mT, start, backend=backend)

    strided_weights = [weights[0].transpose(1, 2).contiguous().transpose(1, 2), weights[1].mT.contiguous().mT]
    assert_close(run(strided, inputs, state, start, strided_weights), expected, 1e-6)


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_no_steps_return_a_copy_of_the_state(backend, poisoned):
    inputs, state = make_inputs(0, 8)
    weights = make_weights(inputs, state)
    y, last, *_, dstate = run(with_backend(backend), inputs, state, odd_starts(0), weights)
    assert y.shape == (2, 0, 2, 8)
    assert torch.equal(last, state) and torch.equal(dstate, weights[1])
    assert wkv7(*inputs, state, backend=backend)[1].data_ptr() != state.data_ptr()


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_no_state_is_a_state_of_zeros_and_nothing_is_modified(backend):
    inputs, state = make_inputs(18, 8)
    start = odd_starts(18)
    before = [x.clone() for x in (*inputs, state, start)]
    y, last = wkv7(*inputs, torch.zeros_like(state), start, backend=backend)
    y_none, last_none = wkv7(*inputs, None, start, backend=backend)
    assert torch.equal(y, y_none) and torch.equal(last, last_none)
    wkv7(*inputs, state, start, backend=backend)
    assert all(torch.equal(x, y) for x, y in zip(before, (*inputs, state, start), strict=True))


@pytest.mark.parametrize("backend", FAST)
def test_pieces_that_carry_the_state_equal_one_pass(backend):
    inputs, state = make_inputs(77, 16)
    start = odd_starts(77)
    weights = make_weights(inputs, state)

    def pieces(*leaves):
        *tensors, state, start = leaves
        ys = []
        for begin, end in ((0, 1), (1, 34), (34, 34), (34, 77)):
            y, state = wkv7(*(x[:, begin:end] for x in tensors), state, start[:, begin:end], backend=backend)
            ys.append(y)
        return torch.cat(ys, 1), state

    whole = run(with_backend(backend), inputs, state, start, weights)
    assert_close(run(pieces, inputs, state, start, weights), whole, 2e-6)


@pytest.mark.parametrize("backend", FAST)
def test_seq_start_equals_separate_documents(backend):
    inputs, state = make_inputs(70, 16, batch=1)
    start = torch.zeros(1, 70, dtype=torch.bool)
    start[0, [23, 37]] = True
    weights = make_weights(inputs, state)

    def documents(*leaves):
        *tensors, state, _ = leaves
        ys = []
        for begin, end in ((0, 23), (23, 37), (37, 70)):
            y, last = wkv7(*(x[:, begin:end] for x in tensors), state if begin == 0 else None, backend=backend)
            ys.append(y)
        return torch.cat(ys, 1), last

    packed = run(with_backend(backend), inputs, state, start, weights)
    *separate, dstate = run(documents, inputs, state, None, weights)
    assert_close(packed, [*separate, dstate], 2e-6)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_what_is_not_finite_ends_with_its_document(backend):
    inputs, state = make_inputs(40, 8, batch=1)
    start = torch.zeros(1, 40, dtype=torch.bool)
    start[0, 37] = True
    y, last = wkv7(*inputs, torch.full_like(state, float("nan")), start, backend=backend)
    assert y[:, :37].isnan().all() and y[:, 37:].isfinite().all() and last.isfinite().all()


@pytest.mark.parametrize("arrives", [0, 1])
def test_gradient_at_only_one_output(arrives):
    inputs, state = make_inputs(40, 16)
    grads = []
    for backend in ("reference", "cpu"):
        leaves = [x.clone().requires_grad_() for x in (*inputs, state)]
        output = wkv7(*leaves, backend=backend)[arrives]
        grads.append(torch.autograd.grad(output.square().sum(), leaves, materialize_grads=True))
    for mine, exact in zip(grads[1], grads[0], strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("n_head", [1, 5])
def test_threads_do_not_change_the_result(n_head):
    inputs, state = make_inputs(33, 40, batch=1, n_head=n_head)
    weights = make_weights(inputs, state)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 4):  # more than heads: the value rows of a head are shared out
            torch.set_num_threads(threads)
            results.append(run(with_backend("cpu"), inputs, state, None, weights))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


def test_the_states_of_all_steps_are_not_kept():
    inputs, state = make_inputs(512, 64, batch=1, n_head=1)
    kept = []
    leaves = [x.requires_grad_() for x in inputs]
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.append(x), x)[1], lambda x: x):
        wkv7(*leaves, state, backend="cpu")
    beyond_inputs = sum(x.nbytes for x in kept) - sum(x.nbytes for x in inputs)
    per_step = state.nbytes
    assert 0 < beyond_inputs <= 512 * per_step / 20
    _, _, states, u = cpu_wkv7.forward(cpu_wkv7.load_library(cpu_wkv7.SOURCE), inputs, state, None, save=False)
    assert states.numel() == u.numel() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n_steps", [0, 1, 40])
def test_operators_pass_opcheck(n_steps, dtype):
    inputs, state = make_inputs(n_steps, 8, dtype)
    leaves = [x.requires_grad_() for x in (*inputs, state)]
    start = odd_starts(n_steps)
    torch.library.opcheck(torch.ops.rwkv_miss.wkv7_cpu.default, (*leaves, start, True))
    detached = [x.detach() for x in leaves]
    torch.library.opcheck(torch.ops.rwkv_miss.wkv7_cpu.default, (*detached, start, False))
    y, last, states, u = torch.ops.rwkv_miss.wkv7_cpu(*detached, start, True)
    arguments = (*detached[:6], start, states, u, y, last)
    torch.library.opcheck(torch.ops.rwkv_miss.wkv7_cpu_backward.default, arguments)
    torch.library.opcheck(torch.ops.rwkv_miss.wkv7_cpu_backward.default, (*arguments[:-2], None, None))


def test_compiles_as_one_graph():
    inputs, state = make_inputs(20, 8)
    start = odd_starts(20)
    weights = make_weights(inputs, state)
    compiled = torch.compile(wkv7, fullgraph=True, backend="aot_eager")
    eager = run(wkv7, inputs, state, start, weights)
    assert_close(run(compiled, inputs, state, start, weights), eager, 1e-6)


def test_a_backend_that_cannot_be_used_says_why():
    inputs, state = make_inputs(2, 4, torch.float64)
    with pytest.raises(UserError, match=r"'cpu' cannot be used.*float64"):
        wkv7(*inputs, state, backend="cpu")
    with pytest.raises(UserError, match=r"'cpu' cannot be used.*on meta"):
        wkv7(*(x.float().to("meta") for x in inputs), backend="cpu")
    with pytest.raises(UserError, match="'cuda9'; choose one of auto, reference"):
        wkv7(*inputs, state, backend="cuda9")


@pytest.fixture
def no_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "/nowhere/c++")
    caches = (cpu_wkv7._library_or_reason, announce)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


def test_without_a_compiler_auto_takes_torch_and_says_so_once(no_compiler, caplog):
    inputs, state = make_inputs(20, 8)
    with caplog.at_level(logging.INFO, logger="rwkv_miss"):
        y, _ = wkv7(*inputs, state)
        wkv7(*inputs, state)
    assert torch.equal(y, wkv7(*inputs, state, backend="torch")[0])
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert "'torch'; not 'cpu': no working C++ compiler" in caplog.text and "/nowhere/c++" in caplog.text
    with pytest.raises(UserError, match="'cpu' cannot be used: no working C\\+\\+ compiler"):
        wkv7(*inputs, state, backend="cpu")


def test_with_a_compiler_auto_takes_cpu(caplog):
    announce.cache_clear()
    inputs, state = make_inputs(20, 8)
    with caplog.at_level(logging.INFO, logger="rwkv_miss"):
        y, _ = wkv7(*inputs, state)
    assert torch.equal(y, wkv7(*inputs, state, backend="cpu")[0])
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [("INFO", "wkv7: using backend 'cpu'")]


@pytest.mark.parametrize(
    ("name", "change", "found"),
    [
        ("r", lambda x: x[:, :1], r"r is \(2, 1, 2, 4\)"),
        ("v", lambda x: x[0], r"v has shape \(3, 2, 4\)"),
        ("v", lambda x: x.half(), "v is torch.float16"),
        ("b", lambda x: x.bfloat16(), "b is .* torch.bfloat16"),
        ("state", lambda x: x.bfloat16(), "state is .* torch.bfloat16"),
        ("state", lambda x: x[:1], r"state is \(1, 2, 4, 4\)"),
        ("seq_start", lambda x: x.int(), "seq_start is .* torch.int32"),
        ("seq_start", lambda x: x[:, 1:], r"seq_start is \(2, 2\)"),
        ("k", lambda x: x.to("meta"), "k is .* on meta"),
    ],
)
def test_wrong_arguments_are_named_with_what_was_found(name, change, found):
    inputs, state = make_inputs(3, 4)
    arguments = dict(zip("rzkvab", inputs, strict=True), state=state, seq_start=odd_starts(3))
    arguments[name] = change(arguments[name])
    with pytest.raises(UserError, match=found):
        wkv7(**arguments)


def test_every_backend_is_tested_here():
    assert set(BACKENDS) == {"auto", "reference", "cuda", *FAST}  # cuda: tests/ops/cuda
