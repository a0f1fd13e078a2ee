"""cuda/fused.cu, run by the emulator, agrees with the formulas in float64: results and all gradients."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from rwkv_miss.ops.fused_operators import (
    GATED,
    OPS,
    RELU_SQUARED,
    TOKEN_MIX,
    WKV6_OUTPUT,
    WKV7_ARGUMENTS,
    WKV7_OUTPUT,
    FusedOp,
)
from tests.simt import coverage, fused
from tests.simt.fused import PROGRAM, assert_close, differentiable, draw, exact, load_kernels, make_grads, run_kernels
from tests.simt.harness import CUDA, SimtError, build

FP32, BF16 = torch.float32, torch.bfloat16
# Largest relative error in norm: a few roundings of a float32 sum, and half a unit of the last place of bfloat16.
TOLERANCE = {FP32: 2e-6, BF16: 4e-3}
INF, NAN = float("inf"), float("nan")
each_op = pytest.mark.parametrize("op", OPS, ids=lambda x: x.name)


def check(
    op: FusedOp,
    arguments: Sequence[Any],
    wanted: Sequence[str] | None = None,
    library: ctypes.CDLL | None = None,
    blocks: int | None = None,
) -> dict[str, Tensor]:
    """Compares the kernels' results, and the gradients that are wanted (None: all), with the formula."""
    grads, dtype = make_grads(op, arguments), arguments[0].dtype
    wanted = differentiable(op, arguments) if wanted is None else wanted
    found = run_kernels(op, library or load_kernels(dtype), arguments, grads, wanted, blocks=blocks)
    assert_close(found, exact(op, arguments, grads, wanted), TOLERANCE[dtype])
    return found


@each_op
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("sizes", [(2, 19, 3, 64), (3, 5, 6, 24)], ids=str)  # B, T, H, N
def test_agrees_with_the_formula(op, sizes, dtype):
    check(op, draw(op, *sizes, dtype))


@each_op
def test_frozen_parameters(op):
    """Their gradients are not made, and the blocks are others."""
    arguments = draw(op, 2, 19, 3, 64, BF16)
    check(op, arguments, [x for x in differentiable(op, arguments) if x not in op.parameters])


@each_op
def test_only_one_gradient_is_wanted(op):
    arguments = draw(op, 2, 3, 2, 16, FP32)
    for name in differentiable(op, arguments):
        check(op, arguments, [name])


@pytest.mark.parametrize("op", [WKV7_ARGUMENTS, WKV7_OUTPUT, WKV6_OUTPUT], ids=lambda x: x.name)
@pytest.mark.parametrize(("n_head", "n"), [(130, 8), (2, 16), (5, 32), (9, 96), (3, 128), (1, 256)])
def test_every_head_size(op, n_head, n):
    check(op, draw(op, 1, 3, n_head, n, FP32))


@pytest.mark.parametrize("mixes", range(1, 7))
def test_any_number_of_mixes(mixes):
    check(TOKEN_MIX, draw(TOKEN_MIX, 2, 5, mixes, 1032, BF16, ("extra",)))


def test_tensors_that_are_not_there():
    check(TOKEN_MIX, draw(TOKEN_MIX, 2, 5, 2, 16, FP32, ("extra", "seq_start")))
    check(WKV7_ARGUMENTS, draw(WKV7_ARGUMENTS, 2, 5, 2, 16, FP32, ("v", "v_first", "nu")))


@pytest.mark.parametrize("op", [RELU_SQUARED, GATED], ids=lambda x: x.name)
@pytest.mark.parametrize("count", [1, 7, 8, 1023, 1025])
def test_any_number_of_elements(op, count):
    check(op, draw(op, 1, 1, 1, count, BF16))


@pytest.mark.parametrize("blocks", [1, 2, 3, 7, 37, 40])
def test_rows_shared_between_any_number_of_blocks(blocks):
    """Borders between blocks fall anywhere: at a sequence's first step, beside it, and at a document's."""
    arguments = draw(TOKEN_MIX, 2, 18, 2, 8, FP32)
    check(TOKEN_MIX, arguments, blocks=blocks)
    check(WKV7_OUTPUT, draw(WKV7_OUTPUT, 2, 18, 2, 8, FP32), blocks=blocks)


@pytest.mark.parametrize("where", [[], [0], [1], [2, 3], [8], list(range(9))])
def test_documents_begin_anywhere(where):
    """No document begins in the second row of the batch: the flags of the first must not reach it."""
    arguments = draw(TOKEN_MIX, 2, 9, 6, 16, FP32)
    arguments[2] = torch.zeros(2, 9, dtype=torch.bool)
    arguments[2][0, where] = True
    found = check(TOKEN_MIX, arguments)
    assert found["dlast"][0].any() == (0 not in where) and found["dlast"][1].all()


@pytest.mark.parametrize("value", [INF, NAN])
@pytest.mark.parametrize(("begin", "end"), [(0, 4), (4, 5), (5, 9)])
def test_nothing_crosses_a_border(begin, end, value):
    """A document's results are the same to the bit whatever the others and the other sequence hold."""
    arguments = draw(TOKEN_MIX, 2, 9, 3, 16, FP32)
    arguments[2] = torch.zeros(2, 9, dtype=torch.bool)
    arguments[2][0, [0, 4, 5]] = True
    grads, wanted = make_grads(TOKEN_MIX, arguments), ["x", "last", "extra"]
    plain = run_kernels(TOKEN_MIX, load_kernels(FP32), arguments, grads, wanted)

    def others(x: Tensor) -> Tensor:
        """x (..., B, T, C) with the value everywhere but in the document."""
        changed = torch.full_like(x, value)
        changed[..., 0, begin:end, :] = x[..., 0, begin:end, :]
        return changed

    x, last, starts, mixes, extra = arguments
    changed = [others(x), torch.full_like(last, value), starts, mixes, others(extra)]
    found = run_kernels(TOKEN_MIX, load_kernels(FP32), changed, [others(x) for x in grads], wanted)
    assert not found.pop("dlast")[0].any()
    for name, y in found.items():
        assert torch.equal(y[..., 0, begin:end, :], plain[name][..., 0, begin:end, :]), name


@pytest.mark.parametrize("op", [WKV7_ARGUMENTS, WKV7_OUTPUT, WKV6_OUTPUT], ids=lambda x: x.name)
@pytest.mark.parametrize("value", [INF, NAN])
def test_a_step_of_a_head_is_a_matter_of_its_own(op, value):
    arguments = draw(op, 2, 3, 2, 24, FP32)
    grads = make_grads(op, arguments)
    wanted = [x for x in differentiable(op, arguments) if x not in op.parameters]
    plain = run_kernels(op, load_kernels(FP32), arguments, grads, wanted)
    for x, name in (*((x, "") for x in grads), *zip(arguments, op.arguments, strict=True)):
        if isinstance(x, Tensor) and name not in op.parameters:
            x.view(2, 3, 2, 24)[1, 1, 0] = value
    found = run_kernels(op, load_kernels(FP32), arguments, grads, wanted)
    for name, y in found.items():
        same = (y == plain[name]).view(2, 3, 2, 24)
        assert not same[1, 1, 0].any() and same.sum() == same.numel() - 24, name


def test_keys_of_norm_zero_and_below_the_least():
    """The gradient of F.normalize is that of a division by 1e-12 there, and not infinite."""
    arguments = draw(WKV7_ARGUMENTS, 1, 3, 2, 16, FP32)
    arguments[0][0, 0] = 0
    arguments[0][0, 1] *= 1e-14
    found = check(WKV7_ARGUMENTS, arguments)
    assert found["minus_kk"][0, 0].abs().max() == 0 and found["dk"][0, 0].abs().max() > 1e11


@pytest.mark.parametrize("op", [WKV7_OUTPUT, WKV6_OUTPUT], ids=lambda x: x.name)
def test_a_head_of_equal_values_has_no_deviation(op):
    arguments = draw(op, 1, 2, 2, 16, FP32)
    arguments[0][0, 0] = 3.0
    check(op, arguments)


def test_gates_that_are_shut_or_open():
    """The exponential of the sigmoid is infinite, or 0."""
    gate, x = draw(GATED, 1, 1, 1, 6, FP32)
    gate[0, 0, 0] = torch.tensor([-INF, -200.0, -90.0, 90.0, 200.0, INF])
    found = run_kernels(GATED, load_kernels(FP32), [gate, x], [torch.ones_like(x)], ["gate", "x"])
    assert torch.equal(found["out"], x * (gate > 0)) and not found["dgate"].any()


def test_relu_squared_of_what_is_not_finite():
    x = torch.tensor([[[[NAN, -INF, INF, -1.0, 0.0]]]])
    found = run_kernels(RELU_SQUARED, load_kernels(FP32), [x], [torch.full_like(x, INF)], ["x"])
    for y in found.values():
        assert y.flatten()[0].isnan() and y.flatten()[1:].tolist() == [0, INF, 0, 0]


@each_op
def test_the_order_of_threads_changes_no_bit(op):
    arguments = draw(op, 2, 9, 2, 24, BF16)
    grads, wanted = make_grads(op, arguments), differentiable(op, arguments)
    first, *rest = (run_kernels(op, load_kernels(BF16), arguments, grads, wanted, seed) for seed in (0, 10))
    for other in rest:
        assert all(torch.equal(first[name], other[name]) for name in first)


# By what is wrong: an op, a part of the file and what is in its place, and how it shows.
FAULTS = {
    "a document's border": (TOKEN_MIX, "if (begins(seq_start, row)) clear(to_previous);", "", "dx: error"),
    "a sequence's border": (TOKEN_MIX, "t == 0 ? 0.0f : to_previous[c]", "to_previous[c]", "dx: error"),
    "a block's border": (TOKEN_MIX, "at.end % steps ? at.end : at.end - 1", "at.end - 1", "dx: error"),
    "lanes without channels": (
        WKV7_OUTPUT,
        "at.inside ? ys[c] - sums[0] * part : 0.0f",
        "ys[c] - sums[0] * part",
        "out",
    ),
    "a channel too many": (WKV7_OUTPUT, "in_head < n;", "in_head <= n;", "out of bounds"),
    "a shuffle that not all lanes reach": (WKV6_OUTPUT, "at.sum_head(sq", "if (at.inside) at.sum_head(sq", "divergent"),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_kernel_is_found(fault, tmp_path):
    op, right, wrong, found = FAULTS[fault]
    text = PROGRAM.source.read_text()
    assert right in text
    (tmp_path / "common.cuh").write_text((CUDA / "common.cuh").read_text())
    (tmp_path / "fused.cu").write_text(text.replace(right, wrong))
    library = build(tmp_path / "fused.cu", tmp_path, *PROGRAM.variants[FP32])
    with pytest.raises(AssertionError, match=found):  # SimtError is one
        check(op, draw(op, 2, 17, 2, 24, FP32), library=library)


@each_op
@pytest.mark.parametrize("change", [(0, 1, 0), (0, 0, 64)], ids=["grid", "block"])
def test_a_wrong_launch_traps(op, change, monkeypatch):
    real = fused.launch

    def wrong(library, kernel, grid, block, *more):
        real(library, kernel, (grid[0], grid[1] + change[1]), block - change[2], *more)

    monkeypatch.setattr(fused, "launch", wrong)
    with pytest.raises(SimtError, match="__trap"):
        check(op, draw(op, 1, 2, 1, 16, FP32))


@pytest.mark.slow
def test_every_line_of_the_kernels_has_run(tmp_path):
    library = build(PROGRAM.source, tmp_path, *PROGRAM.variants[FP32], *coverage.OPTIONS)
    for op in OPS:
        check(op, draw(op, 2, 17, 6, 24, FP32), library=library)
    check(GATED, draw(GATED, 1, 1, 1, 9, FP32), library=library)
    ran = {place: line_ran for place, line_ran in coverage.lines_run(library).items() if place[0] == "fused.cu"}
    assert len(ran) > 150
    assert sorted(place for place, line_ran in ran.items() if not line_ran) == []
