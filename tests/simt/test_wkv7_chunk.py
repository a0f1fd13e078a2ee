"""cuda/wkv7_chunk.cu, run by the emulator: results and gradients are those of the float64 reference within the
roundings of bfloat16, nothing of one document reaches another, and faults planted in the kernel are found."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from rwkv_miss.ops.cuda.programs import CHUNK_HEAD_SIZES, PROGRAMS
from tests.ops.cases import WKV7, odd_starts, run
from tests.ops.wkv7_chunk_model import to_bf16, to_two_bf16, wkv7_chunk_model
from tests.simt import coverage
from tests.simt.harness import SimtError, build, build_once, guarded, guarded_copy, launch
from tests.simt.test_wkv import far_apart
from tests.simt.wkv import BF16, FP32, run_chunk

PROGRAM = PROGRAMS["wkv7_chunk"]
# Largest relative error in norm of y, the last state and each gradient, beside float64. A rounding to bf16 has 1.7e-3.
TOLERANCE = 5e-3


def kernels(n: int = 64):
    return build_once(PROGRAM.source, *PROGRAM.variants[BF16, n])


def make_case(n_steps: int, n: int = 64, batch: int = 2, n_head: int = 2) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    inputs, state = WKV7.make_inputs(n_steps, n, BF16, batch, n_head)
    state *= 0.3
    return inputs, state, WKV7.make_weights(inputs, state)


def exact(inputs, state, start, weights) -> list[Tensor]:
    return run(WKV7.reference, [x.double() for x in inputs], state.double(), start, weights)


def check(inputs, state, start, weights, seed=0) -> list[Tensor]:
    mine = run_chunk(kernels(inputs[0].shape[3]), inputs, state, start, weights, seed)
    WKV7.assert_close(mine, exact(inputs, state, start, weights), TOLERANCE)
    return mine


@pytest.mark.parametrize("starts", [False, True])
@pytest.mark.parametrize("n_steps", [1, 15, 16, 17, 64, 65, 135])
def test_agrees_with_the_reference(n_steps, starts):
    inputs, state, weights = make_case(n_steps)
    check(inputs, state, odd_starts(n_steps) if starts else None, weights, seed=n_steps)


@pytest.mark.slow
@pytest.mark.parametrize("n", [32, 128])
def test_agrees_with_the_reference_at_the_other_head_sizes(n):
    inputs, state, weights = make_case(70, n)
    check(inputs, state, odd_starts(70), weights)


def equal_keys(inputs: list[Tensor]) -> None:
    """The same key at every step, removed entirely, and no decay: powers of A_ab would be in the thousands."""
    _, z, k, _, a, b = inputs
    key = normalize(a[:, :1].float(), dim=-1).to(BF16)
    a.copy_(-key), b.copy_(key), k.copy_(key), z.fill_(-30.0)


def near_equal_keys(inputs: list[Tensor]) -> None:
    _, z, k, _, a, b = inputs
    noise = torch.randn(a.shape, generator=torch.Generator().manual_seed(1))
    key = normalize(normalize(a[:, :1].float(), dim=-1) + 0.03 * noise, dim=-1)
    a.copy_(-key), b.copy_(0.95 * key), k.copy_(key + 0.005 * noise), z.fill_(-4.1)


def strongest_decay(inputs: list[Tensor]) -> None:
    inputs[1] += 9


def weakest_decay(inputs: list[Tensor]) -> None:
    inputs[1] -= 9


def outliers(inputs: list[Tensor]) -> None:
    for i in (0, 2, 3):
        inputs[i][:, ::7, :, ::9] *= 1000


def zeros(inputs: list[Tensor]) -> None:
    for i in (0, 2, 4, 5):
        inputs[i][:, 1::3] = 0


@pytest.mark.parametrize("n", [64, pytest.param(128, marks=pytest.mark.slow)])
@pytest.mark.parametrize("change", [equal_keys, near_equal_keys, strongest_decay, weakest_decay, outliers, zeros])
def test_hard_inputs(change, n):
    inputs, state, _ = make_case(100, n, batch=1, n_head=128 // n)
    change(inputs)
    check(inputs, state, None, WKV7.make_weights(inputs, state))


def test_the_model_without_roundings_is_the_op():
    inputs, state = WKV7.make_inputs(70, 8, torch.float64)
    weights = WKV7.make_weights(inputs, state)
    model = wkv7_chunk_model(inputs, state, odd_starts(70), *weights, every=4)
    WKV7.assert_close(model, exact(inputs, state, odd_starts(70), weights), 1e-13)


@pytest.mark.parametrize("n", [64, pytest.param(128, marks=pytest.mark.slow)])
def test_rounds_where_the_model_rounds(n):
    """What is left are roundings that went the other way, for sums taken in another order."""
    inputs, state, weights = make_case(100, n, n_head=128 // n)
    mine = run_chunk(kernels(n), inputs, state, odd_starts(100), weights, 0)
    model = wkv7_chunk_model(
        inputs, state, odd_starts(100), *weights, rnd=to_bf16, split=to_two_bf16, checkpoint=to_bf16, every=4
    )
    rounded = [x.bfloat16() if y.dtype == BF16 else x for x, y in zip(model, mine, strict=True)]
    WKV7.assert_close(mine, rounded, 5e-4)


@pytest.mark.slow
@pytest.mark.parametrize("where", [[0], [15], [16], [17], [31, 32, 33], [63, 64], [69], list(range(70))])
def test_documents_begin_anywhere(where):
    """No document begins in the second row of the batch: the flags of the first must not reach it."""
    inputs, state, weights = make_case(70)
    start = torch.zeros(2, 70, dtype=torch.bool)
    start[0, where] = True
    mine = check(inputs, state, start, weights)
    assert (mine[3][start] == 0).all() and (mine[6][start] == 0).all()  # dz, da: there is no state there


@pytest.mark.parametrize(
    ("begin", "end", "n"), [(0, 5, 64), (5, 33, 64), (33, 70, 64), pytest.param(5, 33, 128, marks=pytest.mark.slow)]
)
def test_nothing_crosses_a_border(begin, end, n):
    """A document's results are the same to the bit whatever the others hold, infinities and NaN too, and however many
    blocks share a head."""
    inputs, state, weights = make_case(70, n, batch=1, n_head=128 // n)
    start = torch.zeros(1, 70, dtype=torch.bool)
    start[0, [0, 5, 33]] = True

    def others(x: Tensor, value: float) -> Tensor:
        x = x.clone()
        x[:, :begin], x[:, end:] = value, value
        return x

    plain = run_chunk(kernels(n), inputs, state, start, weights, 0)
    for value in (float("inf"), float("nan")):
        changed = [others(x, value) for x in inputs]
        last = weights[1] if end == 70 else torch.full_like(weights[1], value)
        first = torch.full_like(state, value)
        found = run_chunk(kernels(n), changed, first, start, [others(weights[0], value), last], 1, n_blocks=3)
        for i, (x, y) in enumerate(zip(plain, found, strict=True)):
            if x.dim() == 4 and x.shape[1] == 70:
                assert torch.equal(x[:, begin:end], y[:, begin:end]), WKV7.results[i]
        assert end != 70 or torch.equal(plain[1], found[1])
        assert not found[-1].any() or begin == 0  # the first state is seen by nobody


OTHER_BORDERS = [[3, 131], [66], [67], [68], [134], [16, 32, 64, 128], [33, 67, 101], list(range(60, 75))]


@pytest.mark.parametrize(
    ("n_steps", "where"),
    [
        (135, [0, 5, 6, 33, 34, 70, 100, 101, 102]),
        *(pytest.param(135, x, marks=pytest.mark.slow) for x in OTHER_BORDERS),
        pytest.param(128, [], marks=pytest.mark.slow),
    ],
)
def test_blocks_that_share_a_head_change_no_bit(n_steps, where):
    """Two blocks' shares of 135 steps meet at 67, those of four also at 33 and 101. 64 flags are read at once."""
    inputs, state, weights = make_case(n_steps, batch=1, n_head=1)
    start = torch.zeros(1, n_steps, dtype=torch.bool)
    start[0, where] = True
    one = run_chunk(kernels(), inputs, state, start, weights, 0)
    for n_blocks in (2, 4, 8):
        assert all(map(torch.equal, one, run_chunk(kernels(), inputs, state, start, weights, 1, n_blocks=n_blocks)))


@pytest.mark.parametrize("n_steps", [0, 3])
def test_more_blocks_than_steps(n_steps):
    inputs, state, weights = make_case(n_steps)
    start = odd_starts(n_steps)
    start[1, 1:2] = True
    one, many = (run_chunk(kernels(), inputs, state, start, weights, 0, n_blocks=x) for x in (1, 8))
    assert all(map(torch.equal, one, many))


def test_no_gradient_of_the_last_state_is_zeros():
    inputs, state, weights = make_case(33)
    zeros = run_chunk(kernels(), inputs, state, None, [weights[0], torch.zeros_like(state)], 0)
    none = run_chunk(kernels(), inputs, state, None, [weights[0], None], 0)
    assert all(map(torch.equal, zeros, none))


def test_inference_saves_nothing_and_agrees():
    inputs, state, weights = make_case(33)
    outputs = guarded(inputs[0].shape, BF16), guarded(state.shape, FP32)
    arguments = [*map(guarded_copy, (*inputs, state)), None, *outputs, None, 33, 2]
    launch(kernels(), "wkv7_chunk_forward", (4, 1), 128, arguments, 5)
    trained = run_chunk(kernels(), inputs, state, None, weights, 0)
    assert all(map(torch.equal, outputs, trained[:2]))


def test_the_order_of_threads_changes_no_bit():
    inputs, state, weights = make_case(70, batch=1)
    first, *others = (run_chunk(kernels(), inputs, state, odd_starts(70, 1), weights, seed) for seed in (0, 10, 20))
    for other in others:
        assert all(map(torch.equal, first, other))


def test_no_steps_hand_the_state_on():
    inputs, state, weights = make_case(0)
    mine = run_chunk(kernels(), inputs, state, None, weights, 0)
    assert torch.equal(mine[1], state) and torch.equal(mine[-1], weights[1])


def test_wrong_launch_traps():
    inputs, state, _ = make_case(4)
    outputs = guarded(inputs[0].shape, BF16), guarded(state.shape, FP32)
    arguments = [*map(guarded_copy, (*inputs, state)), None, *outputs, None, 4, 2]
    with pytest.raises(SimtError, match="__trap"):
        launch(kernels(), "wkv7_chunk_forward", (4, 1), 64, arguments, 5)


@pytest.mark.slow
def test_more_elements_than_32_bits_count():
    inputs, state, weights = make_case(3, 32, batch=1)
    near = run_chunk(kernels(32), inputs, state, None, weights, 0)

    def far(shape, dtype):
        return far_apart(shape, dtype)

    assert far(inputs[0].shape, BF16)[:, 2].storage_offset() > 2**31
    assert all(map(torch.equal, near, run_chunk(kernels(32), inputs, state, None, weights, 0, far)))


@pytest.mark.parametrize("n", [64, *(pytest.param(n, marks=pytest.mark.slow) for n in CHUNK_HEAD_SIZES if n != 64)])
def test_the_table_has_the_shared_memory_that_the_kernels_name(n):
    inputs, state, weights = make_case(1, n, 1, 1)
    run_chunk(kernels(n), inputs, state, None, weights, 0)
    assert kernels(n).simt_dynamic_bytes() == PROGRAM.shared_bytes((BF16, n))["wkv7_chunk_backward"]
    outputs = guarded(inputs[0].shape, BF16), guarded(state.shape, FP32)
    arguments = [*map(guarded_copy, (*inputs, state)), None, *outputs, None, 1, 1]
    launch(kernels(n), "wkv7_chunk_forward", (1, 1), 2 * n, arguments, 5)
    assert kernels(n).simt_dynamic_bytes() == PROGRAM.shared_bytes((BF16, n))["wkv7_chunk_forward"]


FAULTS = {
    "a wait for copies that is missing": ("        wait_for_copies();\n", "", "has not waited for its copy"),
    "a barrier that is missing": (
        "        __syncthreads();\n        unsigned in_v[4], in_u[4]",
        "        unsigned in_v[4], in_u[4]",
        "race|never written",
    ),
    "a fragment that is swapped": ("mma(c[1], a, b[2], b[3]);", "mma(c[1], a, b[3], b[2]);", "y: error"),
    "a stage that is overwritten too early": ("read(next, stage ^ 1);", "read(next, stage);", "race|copy|y: error"),
    "a block that goes on through another's steps": (
        "next.t0 < steps && !(next.begins() && next.first() >= range.end)",
        "next.t0 < steps",
        "race: global memory",
    ),
    "one that goes on backwards": ("piece.begins() ? range.begin : 0", "0", "race: global memory"),
    "states that blocks keep in one place": (
        "(head.index * gridDim.y + blockIdx.y) * REPLAYED",
        "head.index * REPLAYED",
        "race: global memory",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_kernel_is_found(fault, tmp_path):
    right, wrong, found = FAULTS[fault]
    sources = {path.name: path.read_text() for path in PROGRAM.source.parent.glob("*.cu*")}
    name = next(name for name in ("wkv7_chunk.cu", "mma.cuh") if right in sources[name])
    sources[name] = sources[name].replace(right, wrong)
    for x in ("common.cuh", "mma.cuh", "wkv7_chunk.cu"):
        (tmp_path / x).write_text(sources[x])
    library = build(tmp_path / "wkv7_chunk.cu", tmp_path, *PROGRAM.variants[BF16, 32])
    inputs, state, weights = make_case(66, 32, 1, 1)
    start = torch.zeros(1, 66, dtype=torch.bool)
    start[0, [30, 60]] = True
    with pytest.raises(AssertionError, match=found):  # SimtError is one
        mine = run_chunk(library, inputs, state, start, weights, 0, n_blocks=2)
        WKV7.assert_close(mine, exact(inputs, state, start, weights), TOLERANCE)


@pytest.mark.slow
def test_every_line_of_the_kernels_has_run(tmp_path: Path):
    library = build(PROGRAM.source, tmp_path, *PROGRAM.variants[BF16, 128], *coverage.OPTIONS)
    inputs, state, weights = make_case(135, 128, 1, 1)
    start = odd_starts(135, 1)
    start[0, 50] = True  # in the last chunk of a segment
    run_chunk(library, inputs, state, start, weights, 0, n_blocks=8)
    ran = coverage.lines_run(library)
    of_kernel = {place: line_ran for place, line_ran in ran.items() if place[0] in ("wkv7_chunk.cu", "mma.cuh")}
    assert len(of_kernel) > 250
    assert sorted(place for place, line_ran in of_kernel.items() if not line_ran) == []
