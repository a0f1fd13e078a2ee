"""cuda/wkv7.cu, run by the emulator, agrees with the float64 reference: outputs and all gradients."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor

from rwkv_miss.ops.wkv7_reference import wkv7_reference
from tests.ops.wkv7_cases import assert_close, make_inputs, make_weights, odd_starts, run
from tests.simt import coverage
from tests.simt.harness import CUDA, SimtError, build, guarded, guarded_copy, launch

CHUNK = 16  # as in wkv7.cu
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3}  # the roundings of an fp32 sum; half a unit of bf16
STATE_TOLERANCE = 2e-6


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("simt")
    return cache(lambda n, dtype: build(CUDA / "wkv7.cu", folder, *options(n, dtype)))


def options(n: int, dtype: torch.dtype) -> tuple[str, str]:
    return f"-DHEAD_SIZE={n}", f"-DIO_BF16={int(dtype == torch.bfloat16)}"


def run_kernels(
    library: ctypes.CDLL,
    inputs: list[Tensor],
    state: Tensor,
    seq_start: Tensor | None,
    weights: list[Tensor | None],
    seed: int,
    allocate: Callable[[tuple[int, ...], torch.dtype], Tensor] = guarded,
) -> list[Tensor]:
    """What `wkv7_cases.run` returns, by the three kernels. weights[1] may be None: no gradient of the last state.
    `allocate` makes the tensors with a T."""
    batch, n_steps, n_head, n = inputs[0].shape
    dtype, float32 = inputs[0].dtype, torch.float32
    kept = n if n <= 64 else 32
    grid, block = (batch * n_head, n // kept), 2 * kept
    r, z, k, v, a, b, dy = (allocate(x.shape, dtype).copy_(x) for x in (*inputs, weights[0]))
    sizes = [n_steps, r.stride(1) // n]
    start = None if seq_start is None else guarded_copy(seq_start.to(torch.uint8))
    state_in = guarded_copy(state)
    states = guarded((batch, n_head, -(-n_steps // CHUNK), n, n), float32)
    y, dr, dz, dk, dv, da, db = (allocate(inputs[0].shape, dtype) for _ in range(7))
    last, dstate = (guarded(state.shape, float32) for _ in range(2))
    u, du = (allocate(inputs[0].shape, float32) for _ in range(2))
    grad_last = None if weights[1] is None else guarded_copy(weights[1])

    args = [r, z, k, v, a, b, state_in, start, y, last, states, u, *sizes]
    launch(library, "wkv7_forward", grid, block, args, seed)
    args = [r, z, k, a, b, start, dy, grad_last, dv, du, dstate, *sizes]
    launch(library, "wkv7_backward_values", grid, block, args, seed + 1)
    args = [r, z, k, v, a, b, start, states, u, dy, du, grad_last, dr, dz, dk, da, db, *sizes]
    launch(library, "wkv7_backward_keys", grid, block, args, seed + 2)
    return [x.clone() for x in (y, last, dr, dz, dk, dv, da, db, dstate)]


def check(library, n_steps, n, dtype, z_shift=0.0, batch=2, n_head=2, starts=True, seed=0):
    inputs, state = make_inputs(n_steps, n, dtype, z_shift, batch, n_head)
    start = odd_starts(n_steps, batch) if starts else None
    weights = make_weights(inputs, state)
    mine = run_kernels(library(n, dtype), inputs, state, start, weights, seed)
    exact = run(wkv7_reference, [x.double() for x in inputs], state.double(), start, weights)
    assert_close(mine, exact, TOLERANCE[dtype])
    for place in (1, 8):  # the states are fp32 whatever the inputs are
        assert_close([mine[place]] * 9, [exact[place]] * 9, STATE_TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("n", "n_steps"),
    [(n, t) for n in (8, 16, 32, 64, 128) for t in (1, 15, 16, 17, 257) if (n, t) != (128, 257)]
    + [(128, 49), (24, 33), (96, 33)],
)
def test_agrees_with_reference(library, n, n_steps, dtype):
    check(library, n_steps, n, dtype, starts=n_steps != 15, seed=n + n_steps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("z_shift", [9.0, -9.0], ids=["strongest", "weakest"])
def test_extreme_decay(library, z_shift, dtype):
    check(library, 100, 32, dtype, z_shift, starts=False)


@pytest.mark.parametrize("where", [[0], [15], [16], [17], [31, 32, 33], [39], list(range(40)), []])
def test_documents_begin_anywhere(library, where):
    """The second batch row has no start: flags must not leak from row to row."""
    inputs, state = make_inputs(40, 16)
    start = torch.zeros(2, 40, dtype=torch.bool)
    start[0, where] = True
    weights = make_weights(inputs, state)
    mine = run_kernels(library(16, torch.float32), inputs, state, start, weights, 0)
    exact = run(wkv7_reference, [x.double() for x in inputs], state.double(), start, weights)
    assert_close(mine, exact, TOLERANCE[torch.float32])
    assert (mine[3][start] == 0).all()  # dz: nothing is left to decay there
    assert (mine[6][start] == 0).all()  # da


def test_infinite_state_ends_with_its_document(library):
    inputs, state = make_inputs(20, 16)
    state[:] = float("inf")
    start = torch.zeros(2, 20, dtype=torch.bool)
    start[:, 0] = True
    mine = run_kernels(library(16, torch.float32), inputs, state, start, make_weights(inputs, state), 0)
    for x in mine:
        assert x.isfinite().all()


def test_no_gradient_of_the_last_state_is_zeros(library):
    inputs, state = make_inputs(33, 16)
    weights = make_weights(inputs, state)
    kernels = library(16, torch.float32)
    zeros = run_kernels(kernels, inputs, state, None, [weights[0], torch.zeros_like(state)], 0)
    none = run_kernels(kernels, inputs, state, None, [weights[0], None], 0)
    assert all(map(torch.equal, zeros, none))


def test_inference_saves_nothing_and_agrees(library):
    inputs, state = make_inputs(33, 16)
    kernels = library(16, torch.float32)
    y, last = guarded(inputs[0].shape, torch.float32), guarded(state.shape, torch.float32)
    args = [*map(guarded_copy, inputs), guarded_copy(state), None, y, last, None, None, 33, 2]
    launch(kernels, "wkv7_forward", (4, 1), 32, args, 5)
    trained = run_kernels(kernels, inputs, state, None, make_weights(inputs, state), 0)
    assert torch.equal(y, trained[0])
    assert torch.equal(last, trained[1])


def test_the_order_of_threads_changes_no_bit(library):
    inputs, state = make_inputs(33, 64, torch.bfloat16)
    weights = make_weights(inputs, state)
    first, *others = (
        run_kernels(library(64, torch.bfloat16), inputs, state, odd_starts(33), weights, seed) for seed in (0, 10, 20)
    )
    for other in others:
        assert all(map(torch.equal, first, other))


def test_no_steps_hands_the_state_on(library):
    inputs, state = make_inputs(0, 16)
    weights = make_weights(inputs, state)
    mine = run_kernels(library(16, torch.float32), inputs, state, None, weights, 0)
    assert torch.equal(mine[1], state)
    assert torch.equal(mine[8], weights[1])


@pytest.mark.parametrize(("grid", "block"), [((4, 1), 64), ((4, 2), 32)])
def test_wrong_launch_traps(library, grid, block):
    inputs, state = make_inputs(4, 16)
    outputs = [guarded(inputs[0].shape, torch.float32), guarded(state.shape, torch.float32)]
    args = [*map(guarded_copy, inputs), guarded_copy(state), None, *outputs, None, None, 4, 2]
    with pytest.raises(SimtError, match="__trap"):
        launch(library(16, torch.float32), "wkv7_forward", grid, block, args, 0)


def far_apart(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The first heads of a tensor with 2^27 + 1 of them: its steps are more than 2^30 elements of N = 8 apart. Memory
    is only taken where it is touched."""
    _, n_steps, n_head, n = shape
    stride = (2**27 + 1) * n
    size = ((n_steps - 1) * stride + n_head * n) * dtype.itemsize
    memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000))
    return torch.frombuffer(memory, dtype=dtype).as_strided(shape, (0, stride, n, 1))


def test_more_elements_than_32_bits_count(library):
    inputs, state = make_inputs(3, 8, torch.bfloat16, batch=1)
    weights = make_weights(inputs, state)
    kernels = library(8, torch.bfloat16)
    assert far_apart(inputs[0].shape, torch.bfloat16)[:, 2].storage_offset() > 2**31
    near = run_kernels(kernels, inputs, state, None, weights, 0)
    far = run_kernels(kernels, inputs, state, None, weights, 0, far_apart)
    assert all(map(torch.equal, near, far))


def test_every_line_of_the_kernels_has_run(tmp_path):
    """With one head size and both types: what the tests above compare with the reference is all that there is."""
    ran: dict[tuple[str, int], bool] = {}
    for dtype in (torch.float32, torch.bfloat16):
        kernels = build(CUDA / "wkv7.cu", tmp_path, *options(16, dtype), *coverage.OPTIONS)
        inputs, state = make_inputs(33, 16, dtype)
        run_kernels(kernels, inputs, state, odd_starts(33), make_weights(inputs, state), 0)
        for place, line_ran in coverage.lines_run(kernels).items():
            ran[place] = ran.get(place, False) or line_ran
    assert {file for file, _ in ran} == {"wkv7.cu", "common.cuh"}
    assert len(ran) > 200
    assert sorted(place for place, line_ran in ran.items() if not line_ran) == []
