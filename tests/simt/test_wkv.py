"""cuda/wkv6.cu and cuda/wkv7.cu, run by the emulator, agree with the float64 reference: results and all gradients."""

from __future__ import annotations

import mmap

import pytest
import torch
from torch import Tensor

from rwkv_miss.ops.cuda.programs import PROGRAMS
from rwkv_miss.ops.cuda.wkv import launch_shape
from tests.ops.cases import WKV6, WKV7, WkvCase, odd_starts, run
from tests.simt import coverage
from tests.simt.harness import SimtError, build
from tests.simt.wkv import BF16, FP32, launch_forward, load_kernels, run_kernels

# Largest relative error in norm: a few roundings of a float32 sum, and half a unit of the last place of bfloat16.
TOLERANCE = {FP32: 2e-6, BF16: 4e-3}


@pytest.fixture(params=[WKV6, WKV7], ids=lambda x: x.name)
def wkv(request) -> WkvCase:
    return request.param


def assert_exact(wkv, mine, inputs, state, start, weights, tolerance=None):
    """Compares what `run_kernels` returned with the reference in float64."""
    exact = run(wkv.reference, [x.double() for x in inputs], state.double(), start, weights)
    wkv.assert_close(mine, exact, tolerance or TOLERANCE[inputs[0].dtype])
    for place in (1, -1):  # the states are float32 whatever the inputs are
        wkv.assert_close([mine[place]] * len(mine), [exact[place]] * len(mine), tolerance or TOLERANCE[FP32])


def check(wkv, inputs, state, start, seed=0, tolerance=None) -> list[Tensor]:
    """Runs the kernels, compares with the reference, and returns the results as `cases.run` does."""
    weights = wkv.make_weights(inputs, state)
    kernels = load_kernels(wkv, inputs[0].shape[3], inputs[0].dtype)
    mine = run_kernels(wkv, kernels, inputs, state, start, weights, seed)
    assert_exact(wkv, mine, inputs, state, start, weights, tolerance)
    return mine


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("n", "n_steps"),
    [(n, t) for n in (8, 16, 32, 64, 128) for t in (1, 15, 16, 17, 257) if (n, t) != (128, 257)]
    + [(128, 49), (24, 33), (96, 33)],
)
def test_agrees_with_reference(wkv, n, n_steps, dtype):
    inputs, state = wkv.make_inputs(n_steps, n, dtype)
    check(wkv, inputs, state, odd_starts(n_steps) if n_steps != 15 else None, n + n_steps)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("z_shift", [9.0, -9.0], ids=["strongest", "weakest"])
def test_extreme_decay_of_wkv7(z_shift, dtype):
    inputs, state = WKV7.make_inputs(100, 32, dtype)
    inputs[1] += z_shift
    check(WKV7, inputs, state, None)


# Decays of 0.9997, 6e-4, 2e-24, 1e-30, and from w = 5 on such as are 0 in float32. The rounding of exp(w) alone puts a
# decay exp(-exp(w)) off by 6e-8 exp(w): hence the tolerance.
@pytest.mark.parametrize("w", [-8.0, 2.0, 4.0, 4.235, 5.0, 6.0, 40.0])
def test_extreme_decay_of_wkv6(w):
    inputs, state = WKV6.make_inputs(100, 32)
    inputs[3] = w + 0.1 * torch.rand_like(inputs[3])
    mine = check(WKV6, inputs, state, odd_starts(100), tolerance=2e-5 if w > 0 else None)
    assert (mine[5] == 0).all() == (w >= 5)  # dw


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_decays_of_zero_among_others(dtype):
    """From w = 89 on exp(w) is infinite in float32: dw must be 0 there, and not infinity * 0."""
    inputs, state = WKV6.make_inputs(50, 16, dtype)
    inputs[3][:, ::3] = torch.tensor([5.0, 60.0, 90.0, 3e38] * 4)
    dw = check(WKV6, inputs, state, odd_starts(50))[5]
    assert (dw[:, ::3] == 0).all() and (dw[:, 1::3] != 0).any()


@pytest.mark.parametrize("where", [[0], [15], [16], [17], [31, 32, 33], [39], list(range(40)), []])
def test_documents_begin_anywhere(wkv, where):
    """No document begins in the second row of the batch: the flags of the first must not reach it."""
    inputs, state = wkv.make_inputs(40, 16)
    start = torch.zeros(2, 40, dtype=torch.bool)
    start[0, where] = True
    mine = check(wkv, inputs, state, start)
    for nothing in ("dw",) if wkv is WKV6 else ("dz", "da"):
        assert (mine[wkv.results.index(nothing)][start] == 0).all()  # the state is zeros there: nothing decays


def test_packed_equals_alone(wkv):
    """Each document of a row has the results and the gradients that it has alone, from a state of zeros."""
    ends = [1, 14, 30, 32, 49, 70]  # of the documents
    inputs, state = wkv.make_inputs(70, 32, batch=1)
    kernels = load_kernels(wkv, 32, FP32)
    start = torch.zeros(1, 70, dtype=torch.bool)
    start[0, [0, *ends[:-1]]] = True
    weights = wkv.make_weights(inputs, state)
    packed = run_kernels(wkv, kernels, inputs, state, start, weights, 0)
    alone = []
    for begin, end in zip([0, *ends[:-1]], ends, strict=True):
        own = [x[:, begin:end] if x.dim() == 4 else x for x in inputs]
        own_weights = [weights[0][:, begin:end], weights[1] if end == 70 else None]
        alone.append(run_kernels(wkv, kernels, own, torch.zeros_like(state), None, own_weights, begin))
    expected = [torch.cat(x, 1) if x[0].dim() == 4 else sum(x) for x in zip(*alone, strict=True)]
    expected[1], expected[-1] = alone[-1][1], torch.zeros_like(state)
    wkv.assert_close(packed, expected, 1e-6)


def test_infinite_state_ends_with_its_document(wkv):
    inputs, state = wkv.make_inputs(20, 16)
    state[:] = float("inf")
    weights = wkv.make_weights(inputs, state)
    start = torch.zeros(2, 20, dtype=torch.bool)
    start[:, 0] = True
    for x in run_kernels(wkv, load_kernels(wkv, 16, FP32), inputs, state, start, weights, 0):
        assert x.isfinite().all()
    start[:, 0], start[:, 5] = False, True
    mine = run_kernels(wkv, load_kernels(wkv, 16, FP32), inputs, state, start, weights, 0)
    assert not mine[0][:, :5].isfinite().any()
    for name, x in zip(wkv.results, mine, strict=True):
        assert name == "du" or (x[:, 5:] if x.shape == inputs[0].shape else x).isfinite().all(), name


def test_infinite_gradient_stays_in_its_document(wkv):
    inputs, state = wkv.make_inputs(20, 16)
    weights = wkv.make_weights(inputs, state)
    weights[0][:, 7:], weights[1][:] = float("inf"), float("inf")
    start = torch.zeros(2, 20, dtype=torch.bool)
    start[:, 5] = True
    mine = run_kernels(wkv, load_kernels(wkv, 16, FP32), inputs, state, start, weights, 0)
    for name, x in zip(wkv.results, mine, strict=True):
        assert name == "du" or (x[:, :5] if x.shape == inputs[0].shape else x).isfinite().all(), name


def test_no_gradient_of_the_last_state_is_zeros(wkv):
    inputs, state = wkv.make_inputs(33, 16)
    weights = wkv.make_weights(inputs, state)
    kernels = load_kernels(wkv, 16, FP32)
    zeros = run_kernels(wkv, kernels, inputs, state, None, [weights[0], torch.zeros_like(state)], 0)
    none = run_kernels(wkv, kernels, inputs, state, None, [weights[0], None], 0)
    assert all(map(torch.equal, zeros, none))


def test_inference_saves_nothing_and_agrees(wkv):
    inputs, state = wkv.make_inputs(33, 16)
    kernels = load_kernels(wkv, 16, FP32)
    y, last = launch_forward(wkv, kernels, inputs, state, *launch_shape(2, 2, 16))
    trained = run_kernels(wkv, kernels, inputs, state, None, wkv.make_weights(inputs, state), 0)
    assert torch.equal(y, trained[0])
    assert torch.equal(last, trained[1])


@pytest.mark.slow
def test_the_order_of_threads_changes_no_bit(wkv):
    inputs, state = wkv.make_inputs(33, 64, BF16)
    weights = wkv.make_weights(inputs, state)
    first, *others = (
        run_kernels(wkv, load_kernels(wkv, 64, BF16), inputs, state, odd_starts(33), weights, seed)
        for seed in (0, 10, 20)
    )
    for other in others:
        assert all(map(torch.equal, first, other))


def test_no_steps_hand_the_state_on(wkv):
    inputs, state = wkv.make_inputs(0, 16)
    weights = wkv.make_weights(inputs, state)
    mine = run_kernels(wkv, load_kernels(wkv, 16, FP32), inputs, state, None, weights, 0)
    assert torch.equal(mine[1], state)
    assert torch.equal(mine[-1], weights[1])
    assert wkv is WKV7 or (mine[wkv.results.index("du")] == 0).all()


@pytest.mark.parametrize(("grid", "block"), [((4, 1), 64), ((4, 2), 32)])
def test_wrong_launch_traps(wkv, grid, block):
    inputs, state = wkv.make_inputs(4, 16)
    with pytest.raises(SimtError, match="__trap"):
        launch_forward(wkv, load_kernels(wkv, 16, FP32), inputs, state, grid, block)


def far_apart(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The first heads of a tensor that has 2^27 + 1 of them: with N = 8, neighbouring steps are more than 2^30 elements
    apart. Only the pages that are touched take memory."""
    _, n_steps, n_head, n = shape
    stride = (2**27 + 1) * n
    size = ((n_steps - 1) * stride + n_head * n) * dtype.itemsize
    memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000))
    return torch.frombuffer(memory, dtype=dtype).as_strided(shape, (0, stride, n, 1))


@pytest.mark.slow
def test_more_elements_than_32_bits_count(wkv):
    inputs, state = wkv.make_inputs(3, 8, BF16, batch=1)
    weights = wkv.make_weights(inputs, state)
    kernels = load_kernels(wkv, 8, BF16)
    assert far_apart(inputs[0].shape, BF16)[:, 2].storage_offset() > 2**31
    near = run_kernels(wkv, kernels, inputs, state, None, weights, 0)
    far = run_kernels(wkv, kernels, inputs, state, None, weights, 0, far_apart)
    assert all(map(torch.equal, near, far))


@pytest.mark.slow
def test_every_line_of_the_kernels_has_run(tmp_path):
    """One head size and both dtypes reach every line: no code is left that the tests above do not compare with the
    reference."""
    ran: dict[tuple[str, int], bool] = {}
    for wkv in (WKV6, WKV7):
        for dtype in (FP32, BF16):
            program = PROGRAMS[wkv.name]
            kernels = build(program.source, tmp_path, *program.variants[dtype, 16], *coverage.OPTIONS)
            inputs, state = wkv.make_inputs(33, 16, dtype)
            run_kernels(wkv, kernels, inputs, state, odd_starts(33), wkv.make_weights(inputs, state), 0)
            for place, line_ran in coverage.lines_run(kernels).items():
                ran[place] = ran.get(place, False) or line_ran
    assert {file for file, _ in ran} == {"wkv6.cu", "wkv7.cu", "wkv.cuh", "common.cuh"}
    assert len(ran) > 350
    assert sorted(place for place, line_ran in ran.items() if not line_ran) == []
