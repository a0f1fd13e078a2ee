"""The WKV-6 op: the reference against its definition written otherwise, every backend against the reference."""

from __future__ import annotations

import functools
import logging

import numpy as np
import pytest
import torch
from test_cpu_build import SUPPORTED
from torch import Tensor
from wkv7_cases import TOLERANCE, make_weights, odd_starts, run

from rwkv_miss.errors import UserError
from rwkv_miss.ops import BACKENDS, wkv6
from rwkv_miss.ops.arguments import announce
from rwkv_miss.ops.cpu import build
from rwkv_miss.ops.cpu import wkv6 as cpu_wkv6
from rwkv_miss.ops.wkv6_reference import wkv6_reference

FAST = ("torch", "cpu")
NAMES = ("y", "last state", "dr", "dk", "dv", "dw", "du", "dstate")


def make_inputs(
    n_steps: int, n: int, dtype: torch.dtype = torch.float32, batch: int = 2, n_head: int = 2
) -> tuple[list[Tensor], Tensor]:
    """r, k, v, w, u and a state that is not zero; decays from 0 (w up to 6) to nearly 1 (w down to -8)."""
    generator = torch.Generator().manual_seed(100 * n_steps + n)
    r, k, v, w = torch.randn(4, batch, n_steps, n_head, n, generator=generator, dtype=torch.float64)
    u = torch.randn(n_head, n, generator=generator, dtype=torch.float64)
    state = torch.randn(batch, n_head, n, n, generator=generator, dtype=torch.float64)
    inputs = [x.to(dtype) for x in (r, k, v, (3 * w - 2).clamp(-8, 6), u)]
    return inputs, state.to(torch.float64 if dtype == torch.float64 else torch.float32)


def with_backend(name: str):
    return functools.partial(wkv6, backend=name)


def assert_close(mine: list[Tensor], other: list[Tensor], tolerance: float) -> None:
    """Relative error in norm, of each tensor by itself; what is below the smallest fp32 counts as 0."""
    for name, x, y in zip(NAMES, mine, other, strict=True):
        error = (x.double() - y.double()).norm()
        bound = tolerance * y.double().norm() + 1e-35
        assert error <= bound, f"{name}: error {error:.1e} above {bound:.1e}"  # also fails on NaN


def assert_matches_reference(function, inputs, state, seq_start, tolerance: float | None = None) -> None:
    weights = make_weights(inputs, state)
    mine = run(function, inputs, state, seq_start, weights)
    exact = run(wkv6_reference, [x.double() for x in inputs], state.double(), seq_start, weights)
    assert [x.dtype for x in mine] == [inputs[2].dtype, state.dtype, *(x.dtype for x in (*inputs, state))]
    assert_close(mine, exact, tolerance or TOLERANCE[inputs[2].dtype])
    if inputs[2].dtype == torch.bfloat16:  # the states are fp32 all the same
        for place in (1, 7):
            assert_close([mine[place]] * 8, [exact[place]] * 8, TOLERANCE[torch.float32])


@pytest.fixture
def poisoned():
    """torch.empty and its kin return NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def test_the_reference_is_attention_with_decay():
    inputs, state = make_inputs(9, 6, torch.float64, batch=1, n_head=1)
    start = torch.zeros(1, 9, dtype=torch.bool)
    start[0, 4] = True
    y, last = wkv6(*inputs, state, start, backend="reference")
    r, k, v, w = (x[0, :, 0].numpy() for x in inputs[:4])
    u, d = inputs[4][0].numpy(), np.exp(-np.exp(w))
    for t in range(9):
        first = 4 if t >= 4 else 0
        total = (r[t] * u * k[t]).sum() * v[t]
        for s in range(first, t):
            total = total + (r[t] * d[s + 1 : t].prod(0) * k[s]).sum() * v[s]
        if t < 4:
            total = total + (r[t] * d[:t].prod(0)) @ state[0, 0].numpy()
        np.testing.assert_allclose(y[0, t, 0].numpy(), total, rtol=1e-12)
    end = sum(np.outer(d[s + 1 :].prod(0) * k[s], v[s]) for s in range(4, 9))
    np.testing.assert_allclose(last[0, 0].numpy(), end, rtol=1e-12)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_gradients_are_those_of_finite_differences(backend):
    inputs, state = make_inputs(19, 3, torch.float64, batch=2, n_head=1)
    leaves = [x.requires_grad_() for x in (*inputs, state)]
    assert torch.autograd.gradcheck(lambda *x: wkv6(*x, odd_starts(19), backend=backend), leaves)


@pytest.mark.parametrize("starts", [False, True])
@pytest.mark.parametrize("n", [5, 8, 16, 24, 32, 64, 128])
@pytest.mark.parametrize("n_steps", [1, 2, 15, 16, 17, 257])
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


# Decays of 0.9997, 1e-4, 2e-24 and, in fp32, 0. exp(w) is rounded, so that a decay exp(-exp(w)) is off by 6e-8 exp(w).
@pytest.mark.parametrize("w", [-8.0, 2.22, 4.0, 5.0, 6.0])
@pytest.mark.parametrize("backend", FAST)
def test_weakest_and_strongest_decay(backend, w, poisoned):
    inputs, state = make_inputs(100, 32)
    inputs[3] = w + 0.1 * torch.rand_like(inputs[3])
    assert_matches_reference(with_backend(backend), inputs, state, odd_starts(100), tolerance=2e-5)


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_a_decay_of_zero_has_a_gradient_of_zero(backend):
    inputs, state = make_inputs(40, 8)
    inputs[3][:, ::3] = torch.tensor([5.0, 60.0, 90.0, 1e4] * 2)  # exp(90) is infinite in fp32
    results = run(with_backend(backend), inputs, state, None, make_weights(inputs, state))
    dw = results[NAMES.index("dw")]
    assert all(x.isfinite().all() for x in results)
    assert (dw[:, ::3] == 0).all() and (dw[:, 1::3] != 0).any()


@pytest.mark.parametrize("backend", FAST)
def test_inputs_that_are_not_contiguous(backend):
    inputs, state = make_inputs(20, 8)
    start = odd_starts(20)
    weights = make_weights(inputs, state)
    expected = run(with_backend(backend), inputs, state, start, weights)

    def strided(*leaves):
        *tensors, u, state, start = leaves
        tensors = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors]
        u, start = u.t().contiguous().t(), start.t().contiguous().t()
        assert not tensors[0].is_contiguous() and not u.is_contiguous() and not start.is_contiguous()
        return wkv6(*tensors, u, state.mT.contiguous().mT, start, backend=backend)

    strided_weights = [weights[0].transpose(1, 2).contiguous().transpose(1, 2), weights[1].mT.contiguous().mT]
    assert_close(run(strided, inputs, state, start, strided_weights), expected, 1e-6)


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_no_steps_return_a_copy_of_the_state(backend, poisoned):
    inputs, state = make_inputs(0, 8)
    weights = make_weights(inputs, state)
    y, last, *_, du, dstate = run(with_backend(backend), inputs, state, odd_starts(0), weights)
    assert y.shape == (2, 0, 2, 8)
    assert torch.equal(last, state) and torch.equal(dstate, weights[1]) and (du == 0).all()
    assert wkv6(*inputs, state, backend=backend)[1].data_ptr() != state.data_ptr()


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_no_state_is_a_state_of_zeros_and_nothing_is_modified(backend):
    inputs, state = make_inputs(18, 8)
    start = odd_starts(18)
    before = [x.clone() for x in (*inputs, state, start)]
    y, last = wkv6(*inputs, torch.zeros_like(state), start, backend=backend)
    y_none, last_none = wkv6(*inputs, None, start, backend=backend)
    assert torch.equal(y, y_none) and torch.equal(last, last_none)
    wkv6(*inputs, state, start, backend=backend)
    assert all(torch.equal(x, y) for x, y in zip(before, (*inputs, state, start), strict=True))


@pytest.mark.parametrize("backend", FAST)
def test_pieces_that_carry_the_state_equal_one_pass(backend):
    inputs, state = make_inputs(77, 16)
    start = odd_starts(77)
    weights = make_weights(inputs, state)

    def pieces(*leaves):
        *tensors, u, state, start = leaves
        ys = []
        for begin, end in ((0, 1), (1, 34), (34, 34), (34, 77)):
            y, state = wkv6(*(x[:, begin:end] for x in tensors), u, state, start[:, begin:end], backend=backend)
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
        *tensors, u, state, _ = leaves
        ys = []
        for begin, end in ((0, 23), (23, 37), (37, 70)):
            y, last = wkv6(*(x[:, begin:end] for x in tensors), u, state if begin == 0 else None, backend=backend)
            ys.append(y)
        return torch.cat(ys, 1), last

    packed = run(with_backend(backend), inputs, state, start, weights)
    assert_close(packed, run(documents, inputs, state, None, weights), 2e-6)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_what_is_not_finite_ends_with_its_document(backend):
    inputs, state = make_inputs(40, 8, batch=1)
    start = torch.zeros(1, 40, dtype=torch.bool)
    start[0, 37] = True
    y, last = wkv6(*inputs, torch.full_like(state, float("nan")), start, backend=backend)
    assert y[:, :37].isnan().all() and y[:, 37:].isfinite().all() and last.isfinite().all()


@pytest.mark.parametrize("name", ["r", "k", "v", "w", "u"])
@pytest.mark.parametrize("backend", FAST)
def test_what_is_not_a_number_is_not_hidden(backend, name):
    inputs, state = make_inputs(3, 8)
    inputs["rkvwu".index(name)].fill_(float("nan"))
    assert wkv6(*inputs, state, backend=backend)[0][:, -1].isnan().all()


@pytest.mark.parametrize("arrives", [0, 1])
@pytest.mark.parametrize("backend", FAST)
def test_gradient_at_only_one_output(backend, arrives):
    inputs, state = make_inputs(40, 16)
    grads = []
    for name in ("reference", backend):
        leaves = [x.clone().requires_grad_() for x in (*inputs, state)]
        output = wkv6(*leaves, backend=name)[arrives]
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
        for threads in (1, 2, 4):  # more than heads: the value lanes of a head are shared out
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
        wkv6(*leaves, state, backend="cpu")
    beyond_inputs = sum(x.nbytes for x in kept) - sum(x.nbytes for x in inputs)
    assert 0 < beyond_inputs <= 512 * state.nbytes / 20
    _, _, states = cpu_wkv6.forward(build.load_library(cpu_wkv6.SOURCE), inputs, state, None, save=False)
    assert states.numel() == 0


@pytest.mark.parametrize("capability", list(build.INSTRUCTION_SETS))
def test_every_instruction_set(capability):
    here = torch.backends.cpu.get_cpu_capability()
    if SUPPORTED[capability] > SUPPORTED.get(here, 0):
        pytest.skip(f"this processor has {here}, not {capability}")
    library = build.load_library(cpu_wkv6.SOURCE, capability)
    for n, dtype in ((5, torch.float32), (24, torch.bfloat16), (64, torch.float32)):
        inputs, state = make_inputs(45, n, dtype)
        start = odd_starts(45)
        weights = make_weights(inputs, state)
        y, last, states = cpu_wkv6.forward(library, inputs, state, start, save=True)
        mine = [y, last, *cpu_wkv6.backward(library, inputs, start, states, *weights)]
        exact = run(wkv6_reference, [x.double() for x in inputs], state.double(), start, weights)
        assert_close(mine, exact, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n_steps", [0, 1, 40])
def test_operators_pass_opcheck(n_steps, dtype):
    inputs, state = make_inputs(n_steps, 8, dtype)
    leaves = [x.requires_grad_() for x in (*inputs, state)]
    start = odd_starts(n_steps)
    torch.library.opcheck(torch.ops.rwkv_miss.wkv6_cpu.default, (*leaves, start, True))
    detached = [x.detach() for x in leaves]
    torch.library.opcheck(torch.ops.rwkv_miss.wkv6_cpu.default, (*detached, start, False))
    y, last, states = torch.ops.rwkv_miss.wkv6_cpu(*detached, start, True)
    arguments = (*detached[:5], start, states, y, last)
    torch.library.opcheck(torch.ops.rwkv_miss.wkv6_cpu_backward.default, arguments)
    torch.library.opcheck(torch.ops.rwkv_miss.wkv6_cpu_backward.default, (*arguments[:-2], None, None))


def test_compiles_as_one_graph():
    inputs, state = make_inputs(20, 8)
    start = odd_starts(20)
    weights = make_weights(inputs, state)
    compiled = torch.compile(wkv6, fullgraph=True, backend="aot_eager")
    eager = run(wkv6, inputs, state, start, weights)
    assert_close(run(compiled, inputs, state, start, weights), eager, 1e-6)


def test_a_backend_that_cannot_be_used_says_why():
    inputs, state = make_inputs(2, 4, torch.float64)
    with pytest.raises(UserError, match=r"'cpu' cannot be used.*float64"):
        wkv6(*inputs, state, backend="cpu")
    with pytest.raises(UserError, match=r"'cpu' cannot be used.*on meta"):
        wkv6(*(x.float().to("meta") for x in inputs), backend="cpu")
    with pytest.raises(UserError, match=r"'cuda' cannot be used: it does not compute RWKV-6"):
        wkv6(*inputs, state, backend="cuda")
    with pytest.raises(UserError, match="'cuda9'; choose one of auto, reference"):
        wkv6(*inputs, state, backend="cuda9")


@pytest.fixture
def unannounced():
    caches = (cpu_wkv6._library_or_reason, announce)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


def test_without_a_compiler_auto_takes_torch_and_says_so_once(unannounced, monkeypatch, caplog):
    monkeypatch.setenv("CXX", "/nowhere/c++")
    inputs, state = make_inputs(20, 8)
    with caplog.at_level(logging.INFO, logger="rwkv_miss"):
        y, _ = wkv6(*inputs, state)
        wkv6(*inputs, state)
    assert torch.equal(y, wkv6(*inputs, state, backend="torch")[0])
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert "wkv6: using backend 'torch'; not 'cpu': no working C++ compiler" in caplog.text


def test_with_a_compiler_auto_takes_cpu(unannounced, caplog):
    inputs, state = make_inputs(20, 8)
    with caplog.at_level(logging.INFO, logger="rwkv_miss"):
        y, _ = wkv6(*inputs, state)
    assert torch.equal(y, wkv6(*inputs, state, backend="cpu")[0])
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [("INFO", "wkv6: using backend 'cpu'")]


@pytest.mark.parametrize(
    ("name", "change", "found"),
    [
        ("r", lambda x: x[:, :1], r"r is \(2, 1, 2, 4\)"),
        ("v", lambda x: x[0], r"v has shape \(3, 2, 4\)"),
        ("v", lambda x: x.half(), "v is torch.float16"),
        ("w", lambda x: x.bfloat16(), "w is .* torch.bfloat16"),
        ("u", lambda x: x.flatten(), r"u is \(8,\)"),
        ("u", lambda x: x.bfloat16(), "u is .* torch.bfloat16"),
        ("state", lambda x: x.bfloat16(), "state is .* torch.bfloat16"),
        ("state", lambda x: x[:1], r"state is \(1, 2, 4, 4\)"),
        ("seq_start", lambda x: x.int(), "seq_start is .* torch.int32"),
        ("seq_start", lambda x: x[:, 1:], r"seq_start is \(2, 2\)"),
        ("k", lambda x: x.to("meta"), "k is .* on meta"),
    ],
)
def test_wrong_arguments_are_named_with_what_was_found(name, change, found):
    inputs, state = make_inputs(3, 4)
    arguments = dict(zip("rkvwu", inputs, strict=True), state=state, seq_start=odd_starts(3))
    arguments[name] = change(arguments[name])
    with pytest.raises(UserError, match=found):
        wkv6(**arguments)


def test_every_backend_is_tested_here():
    assert set(BACKENDS) == {"auto", "reference", "cuda", *FAST}
