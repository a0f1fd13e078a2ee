"""Tests of both WKV ops: every backend agrees with the reference, on any input that is allowed."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

import pytest
import torch

from rwkv_miss.benchmarks.common import threads as thread_count
from rwkv_miss.errors import UserError
from rwkv_miss.ops import BACKENDS
from rwkv_miss.ops.cpu import build, kernel
from rwkv_miss.ops.cpu.wkv import source
from rwkv_miss.ops.dispatch import IMPLEMENTATIONS, announce
from tests.ops.cases import TOLERANCE, WKV6, WKV7, odd_starts, run
from tests.processes import run_process

# The backends that run on this machine, besides the reference.
FAST = ("torch", "cpu")
ROOT = Path(__file__).parents[2]
# The instruction sets that build.py compiles for, from the smallest: a processor runs those up to its own.
SUPPORTED = {"DEFAULT": 0, "AVX2": 1, "AVX512": 2}


@pytest.fixture
def forgetful():
    """Clears the cached libraries and messages of the process, before and after the test."""
    caches = (kernel.library_or_reason, announce)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


def steps(inputs: list[torch.Tensor], begin: int, end: int) -> list[torch.Tensor]:
    """The steps from `begin` to `end` of all inputs; u has no steps and stays as it is."""
    return [x[:, begin:end] if x.dim() == 4 else x for x in inputs]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_gradients_are_those_of_finite_differences(wkv, backend):
    inputs, state = wkv.make_inputs(19, 3, torch.float64, batch=1, n_head=1)
    leaves = [x.requires_grad_() for x in (*inputs, state)]
    assert torch.autograd.gradcheck(lambda *x: wkv.op(*x, odd_starts(19, 1), backend=backend), leaves)


@pytest.mark.parametrize("starts", [False, True])
@pytest.mark.parametrize("n", [5, 8, 16, 24, 32, 64, 128])
@pytest.mark.parametrize("n_steps", [1, 2, 15, 16, 17, 257])
@pytest.mark.parametrize("backend", FAST)
def test_backend_matches_reference(wkv, backend, n_steps, n, starts, poisoned):
    inputs, state = wkv.make_inputs(n_steps, n, n_head=1 if n_steps == 257 else 3)
    function = wkv.with_backend(backend)
    wkv.assert_matches_reference(function, inputs, state, odd_starts(n_steps) if starts else None)


@pytest.mark.parametrize("n_steps", [1, 17, 257])
@pytest.mark.parametrize("n", [5, 64])
@pytest.mark.parametrize("backend", FAST)
def test_backend_matches_reference_in_bf16(wkv, backend, n, n_steps, poisoned):
    inputs, state = wkv.make_inputs(n_steps, n, torch.bfloat16)
    wkv.assert_matches_reference(wkv.with_backend(backend), inputs, state, odd_starts(n_steps))


@pytest.mark.parametrize("threads", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [5, 24, 64])
@pytest.mark.parametrize("starts", [False, True])
def test_a_step_without_gradients(wkv, starts, n, dtype, threads, poisoned):
    inputs, state = wkv.make_inputs(1, n, dtype, n_head=1)
    start = torch.tensor([[False], [True]]) if starts else None
    with thread_count(threads):
        y, last = wkv.op(*inputs, state, start, backend="cpu")
    exact_y, exact_last = wkv.reference(*(x.double() for x in inputs), state.double(), start)
    assert (y.double() - exact_y).norm() <= TOLERANCE[dtype] * exact_y.norm()
    assert (last.double() - exact_last).norm() <= TOLERANCE[torch.float32] * exact_last.norm()


def test_torch_matches_reference_in_float64(wkv, poisoned):
    inputs, state = wkv.make_inputs(257, 16, torch.float64)
    wkv.assert_matches_reference(wkv.with_backend("torch"), inputs, state, odd_starts(257))


@pytest.mark.parametrize("capability", list(build.INSTRUCTION_SETS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [5, 24, 64])
def test_every_instruction_set(wkv, capability, dtype, n, monkeypatch, forgetful):
    here = torch.backends.cpu.get_cpu_capability()
    if SUPPORTED[capability] > SUPPORTED.get(here, 0):
        pytest.skip(f"this processor has {here}, not {capability}")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    inputs, state = wkv.make_inputs(45, n, dtype)
    wkv.assert_matches_reference(wkv.with_backend("cpu"), inputs, state, odd_starts(45))
    used = kernel.library_or_reason(source(wkv.name))[0]
    assert used._name == build.load_library(source(wkv.name), capability)._name


@pytest.mark.parametrize("backend", FAST)
def test_inputs_that_are_not_contiguous(wkv, backend):
    inputs, state = wkv.make_inputs(20, 8)
    start = odd_starts(20)
    weights = wkv.make_weights(inputs, state)
    expected = run(wkv.with_backend(backend), inputs, state, start, weights)

    def strided(x):
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
        assert not x.is_contiguous()
        return x

    def of_strided(*leaves):
        return wkv.op(*map(strided, leaves), backend=backend)

    found = run(of_strided, inputs, state, start, [strided(x) for x in weights])
    assert found[0].is_contiguous()
    wkv.assert_close(found, expected, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n_steps", [0, 1, 16, 33, 64])  # whole chunks, and parts of one
@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_y_is_contiguous(wkv, backend, n_steps, dtype):
    inputs, state = wkv.make_inputs(n_steps, 8, dtype)
    y, _ = wkv.op(*inputs, state, odd_starts(n_steps), backend=backend)
    assert y.is_contiguous() and y.shape == inputs[0].shape


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_no_steps_return_a_copy_of_the_state(wkv, backend, poisoned):
    inputs, state = wkv.make_inputs(0, 8)
    weights = wkv.make_weights(inputs, state)
    y, last, *grads, dstate = run(wkv.with_backend(backend), inputs, state, odd_starts(0), weights)
    assert y.shape == (2, 0, 2, 8)
    assert torch.equal(last, state) and torch.equal(dstate, weights[1]) and not any(x.any() for x in grads)
    assert wkv.op(*inputs, state, backend=backend)[1].data_ptr() != state.data_ptr()


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_no_state_is_a_state_of_zeros_and_nothing_is_modified(wkv, backend):
    inputs, state = wkv.make_inputs(18, 8)
    start = odd_starts(18)
    before = [x.clone() for x in (*inputs, state, start)]
    y, last = wkv.op(*inputs, torch.zeros_like(state), start, backend=backend)
    y_none, last_none = wkv.op(*inputs, None, start, backend=backend)
    assert torch.equal(y, y_none) and torch.equal(last, last_none)
    wkv.op(*inputs, state, start, backend=backend)
    assert all(torch.equal(x, y) for x, y in zip(before, (*inputs, state, start), strict=True))


@pytest.mark.parametrize("backend", FAST)
def test_pieces_that_carry_the_state_equal_one_pass(wkv, backend):
    inputs, state = wkv.make_inputs(77, 16)
    start = odd_starts(77)
    weights = wkv.make_weights(inputs, state)

    def pieces(*leaves):
        *tensors, state, start = leaves
        ys = []
        for begin, end in ((0, 1), (1, 34), (34, 34), (34, 77)):
            y, state = wkv.op(*steps(tensors, begin, end), state, start[:, begin:end], backend=backend)
            ys.append(y)
        return torch.cat(ys, 1), state

    whole = run(wkv.with_backend(backend), inputs, state, start, weights)
    wkv.assert_close(run(pieces, inputs, state, start, weights), whole, 2e-6)


@pytest.mark.parametrize("backend", FAST)
def test_seq_start_equals_separate_documents(wkv, backend):
    inputs, state = wkv.make_inputs(70, 16, batch=1)
    start = torch.zeros(1, 70, dtype=torch.bool)
    start[0, [23, 37]] = True
    weights = wkv.make_weights(inputs, state)

    def documents(*leaves):
        *tensors, state, _ = leaves
        ys = []
        for begin, end in ((0, 23), (23, 37), (37, 70)):
            y, last = wkv.op(*steps(tensors, begin, end), state if begin == 0 else None, backend=backend)
            ys.append(y)
        return torch.cat(ys, 1), last

    packed = run(wkv.with_backend(backend), inputs, state, start, weights)
    wkv.assert_close(packed, run(documents, inputs, state, None, weights), 2e-6)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_what_is_not_finite_ends_with_its_document(wkv, backend):
    inputs, state = wkv.make_inputs(40, 8, batch=1)
    start = torch.zeros(1, 40, dtype=torch.bool)
    start[0, 37] = True
    y, last = wkv.op(*inputs, torch.full_like(state, float("nan")), start, backend=backend)
    assert y[:, :37].isnan().all() and y[:, 37:].isfinite().all() and last.isfinite().all()


@pytest.mark.parametrize("begins", [20, 32, 37])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_an_infinite_gradient_stays_in_its_document(wkv, backend, begins):
    inputs, state = wkv.make_inputs(70, 8, batch=1)
    weights = wkv.make_weights(inputs, state)
    weights[0][:, 50:], weights[1][:] = float("inf"), float("inf")
    start = torch.zeros(1, 70, dtype=torch.bool)
    start[0, begins] = True
    results = run(wkv.with_backend(backend), inputs, state, start, weights)
    for name, x in zip(wkv.results, results, strict=True):
        assert name == "du" or (x[:, :begins] if x.shape == inputs[0].shape else x).isfinite().all(), name


@pytest.mark.parametrize("arrives", [0, 1])
@pytest.mark.parametrize("backend", FAST)
def test_gradient_at_only_one_output(wkv, backend, arrives):
    inputs, state = wkv.make_inputs(40, 16)
    grads = []
    for name in ("reference", backend):
        leaves = [x.clone().requires_grad_() for x in (*inputs, state)]
        output = wkv.op(*leaves, backend=name)[arrives]
        grads.append(torch.autograd.grad(output.square().sum(), leaves, materialize_grads=True))
    for mine, exact in zip(grads[1], grads[0], strict=True):
        assert (mine - exact).norm() <= 2e-6 * exact.norm()


@pytest.mark.parametrize("n_head", [1, 5])
def test_threads_do_not_change_the_result(wkv, n_head):
    inputs, state = wkv.make_inputs(33, 40, batch=1, n_head=n_head)
    weights = wkv.make_weights(inputs, state)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 4):  # with more threads than heads, several threads compute the values of one head
            torch.set_num_threads(threads)
            results.append(run(wkv.with_backend("cpu"), inputs, state, None, weights))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


@pytest.mark.slow
def test_a_worker_that_was_forked_after_the_threads_had_started():
    """The threads of OpenMP do not exist in a fork. A DataLoader's worker has one thread, and so needs none of them."""
    code = """
import torch
from torch.utils.data import DataLoader
from tests.ops.cases import WKV6, WKV7
torch.set_num_threads(2)
class Outputs:
    def __len__(self): return 2
    def __getitem__(self, i):
        wkv = (WKV6, WKV7)[i]
        return wkv.op(*wkv.make_inputs(64, 16)[0], backend="cpu")[0]
before = [*map(Outputs().__getitem__, range(2))]
loader = DataLoader(Outputs(), batch_size=None, num_workers=1, multiprocessing_context="fork", timeout=60)
assert all(map(torch.equal, loader, before))
assert all(map(torch.equal, map(Outputs().__getitem__, range(2)), before))
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "PYTHONPATH": str(ROOT)}
    done = run_process([sys.executable, "-c", code], timeout=120, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_the_states_of_all_steps_are_not_kept(wkv):
    inputs, state = wkv.make_inputs(512, 64, batch=1, n_head=1)
    kept = []
    leaves = [x.requires_grad_() for x in inputs]
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.append(x), x)[1], lambda x: x):
        wkv.op(*leaves, state, backend="cpu")
    beyond_inputs = sum(x.nbytes for x in kept) - sum(x.nbytes for x in inputs)
    assert 0 < beyond_inputs <= 512 * state.nbytes / 20
    operator = getattr(torch.ops.rwkv_miss, f"{wkv.name}_cpu")
    assert sum(x.numel() for x in operator(*inputs, state, None, False)[2:]) == 0


@pytest.mark.slow
@pytest.mark.parametrize(("n_steps", "dtype"), [(0, torch.float32), (40, torch.bfloat16)])
def test_operators_pass_opcheck(wkv, n_steps, dtype):
    wkv.opcheck("cpu", *wkv.make_inputs(n_steps, 8, dtype), odd_starts(n_steps))


def test_compiles_as_one_graph(wkv):
    inputs, state = wkv.make_inputs(20, 8)
    start = odd_starts(20)
    weights = wkv.make_weights(inputs, state)
    compiled = torch.compile(wkv.op, fullgraph=True, backend="aot_eager")
    eager = run(wkv.op, inputs, state, start, weights)
    wkv.assert_close(run(compiled, inputs, state, start, weights), eager, 1e-6)


def test_a_backend_that_cannot_be_used_says_why(wkv):
    inputs, state = wkv.make_inputs(2, 4, torch.float64)
    with pytest.raises(UserError, match=r"'cpu' cannot be used.*float64"):
        wkv.op(*inputs, state, backend="cpu")
    with pytest.raises(UserError, match="'cuda' cannot be used: the tensors are on cpu; use backend 'torch'"):
        wkv.op(*inputs, state, backend="cuda")
    with pytest.raises(UserError, match="'cuda9'; choose one of auto, reference"):
        wkv.op(*inputs, state, backend="cuda9")


def test_without_a_compiler_auto_takes_torch_and_says_so_once(wkv, forgetful, monkeypatch, caplog):
    monkeypatch.setenv("CXX", "/nowhere/c++")
    inputs, state = wkv.make_inputs(20, 8)
    with caplog.at_level(logging.INFO, logger="rwkv_miss"):
        y, _ = wkv.op(*inputs, state)
        wkv.op(*inputs, state)
    assert torch.equal(y, wkv.op(*inputs, state, backend="torch")[0])
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert f"{wkv.name}: using backend 'torch'; not 'cpu': no working C++ compiler" in caplog.text
    assert "/nowhere/c++" in caplog.text
    with pytest.raises(UserError, match="'cpu' cannot be used: no working C\\+\\+ compiler"):
        wkv.op(*inputs, state, backend="cpu")


def test_with_a_compiler_auto_takes_cpu(wkv, forgetful, caplog):
    inputs, state = wkv.make_inputs(20, 8)
    with caplog.at_level(logging.INFO, logger="rwkv_miss"):
        y, _ = wkv.op(*inputs, state)
    assert torch.equal(y, wkv.op(*inputs, state, backend="cpu")[0])
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [("INFO", f"{wkv.name}: using backend 'cpu'")]


def wrong(letter: str) -> list[tuple]:
    """(argument, how to make it wrong, what the message must say): every way for `state` and `seq_start`, whose shapes
    are their own, a few for the inputs that have the shape of v, and for the input `letter` its dtype."""
    return [
        ("r", lambda x: x[:, :1], r"r is \(2, 1, 2, 4\)"),
        ("v", lambda x: x[0], r"v has shape \(3, 2, 4\)"),
        ("v", lambda x: x.half(), "v is torch.float16"),
        (letter, lambda x: x.bfloat16(), f"{letter} is .* torch.bfloat16"),
        ("state", lambda x: x.bfloat16(), "state is .* torch.bfloat16"),
        ("state", lambda x: x[:1], r"state is \(1, 2, 4, 4\)"),
        ("state", lambda x: x.to("meta"), "state is .* on meta; expected .* on cpu"),
        ("seq_start", lambda x: x.int(), "seq_start is .* torch.int32"),
        ("seq_start", lambda x: x[:, 1:], r"seq_start is \(2, 2\)"),
        ("seq_start", lambda x: x.to("meta"), "seq_start is .* on meta; expected .* on cpu"),
        ("k", lambda x: x.to("meta"), "k is .* on meta; expected .* on cpu"),
    ]


# The same for u of WKV-6.
OF_U = [
    ("u", lambda x: x.flatten(), r"u is \(8,\)"),
    ("u", lambda x: x.bfloat16(), "u is .* torch.bfloat16"),
    ("u", lambda x: x.to("meta"), "u is .* on meta; expected .* on cpu"),
]


@pytest.mark.parametrize(
    ("recurrence", "name", "change", "found"),
    [(WKV6, *x) for x in (*wrong("w"), *OF_U)] + [(WKV7, *x) for x in wrong("b")],
)
def test_wrong_arguments_are_named_with_what_was_found(recurrence, name, change, found):
    inputs, state = recurrence.make_inputs(3, 4)
    arguments = dict(zip(recurrence.inputs, inputs, strict=True), state=state, seq_start=odd_starts(3))
    arguments[name] = change(arguments[name])
    with pytest.raises(UserError, match=found):
        recurrence.op(**arguments)


def test_every_backend_is_tested_here():
    assert set(BACKENDS) == {
        "auto",
        "reference",
        "cuda",
        "cuda_scalar",
        "fla",
        *FAST,
    }  # "cuda" and "cuda_scalar" are tested in tests/ops/cuda, "fla" by test_fla.py
    assert list(BACKENDS) == ["auto", *IMPLEMENTATIONS]
