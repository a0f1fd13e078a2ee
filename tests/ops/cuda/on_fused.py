"""What lies between matrix products, end to end on the stub driver: from the functions of `rwkv_miss.ops.fused` through
operators and launches to results and gradients. test_launch.py runs this file, with the fixtures of stub_fixtures.py.
"""

from __future__ import annotations

import logging
import re
import struct
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from rwkv_miss.ops import fused
from rwkv_miss.ops.cuda import driver
from rwkv_miss.ops.cuda import fused as cuda
from rwkv_miss.ops.cuda.programs import PROGRAMS
from tests.helpers import loss_sum
from tests.model import test_chunks as models
from tests.ops.cuda.mistakes import swapped_arguments, swapped_sizes, wrong_block, wrong_grid
from tests.ops.cuda.on_stub import misaligned, pointers, strided
from tests.ops.cuda.stub_fixtures import STREAM
from tests.ops.test_fused import CASES, TOLERANCE, Case, assert_close, exact, make, run

FP32, BF16 = torch.float32, torch.bfloat16
SHAPE = (2, 21, 3, 24)  # B, T, H, N


@pytest.fixture(params=CASES)
def case(request) -> Case:
    return CASES[request.param]


def on_cuda(case: Case) -> Callable:
    return partial(fused._run, case.op)


def assert_right(case: Case, shape=SHAPE, dtype=FP32, change: Callable[[Tensor], Tensor] = lambda x: x) -> None:
    """Results and gradients are those of the formula in float64, also of arguments that `change` has changed."""
    arguments = make(case, shape, dtype)

    def changed(*leaves):
        return on_cuda(case)(*(change(x) if isinstance(x, Tensor) else x for x in leaves))

    outputs, grads = run(changed, arguments)
    expected = exact(case, arguments)
    assert {x.dtype for x in (*outputs, *grads) if x is not None} == {dtype}
    assert_close(outputs, expected[0], TOLERANCE[dtype])
    assert_close(grads, expected[1], 4 * TOLERANCE[dtype])


@pytest.mark.parametrize(("shape", "dtype"), [(SHAPE, FP32), ((1, 40, 2, 64), BF16)])
def test_in_float64(case, shape, dtype, session, poisoned):
    assert_right(case, shape, dtype)
    assert [x.kernel for x in session.launches] == [f"{case.name}_forward", f"{case.name}_backward"]


def test_the_launches(case, session):
    """Their grids are those of a whole GPU, and pointers and sizes are where the kernels expect them."""
    arguments = make(case, SHAPE, FP32)
    op = case.op
    outputs = getattr(torch.ops.rwkv_miss, op.name)(*arguments)
    needs = [isinstance(x, Tensor) and x.is_floating_point() for x in arguments]
    grads = [torch.randn_like(x) for x in outputs]
    made = getattr(torch.ops.rwkv_miss, f"{op.name}_backward")(*arguments, grads, needs)
    there = [name for name, x in zip(op.outputs, op.like(*arguments), strict=True) if x is not None]
    wanted = [f"d{name}" for name, needed in zip(op.arguments, needs, strict=True) if needed]
    known = dict(zip(op.tensors, arguments, strict=False)) | dict(zip(there, outputs, strict=True))
    known |= dict(zip((f"d{x}" for x in there), grads, strict=True)) | dict(zip(wanted, made, strict=True))
    known = pointers(**known) | op.sizes(*arguments) | {"eps": struct.unpack("I", struct.pack("f", 64e-5))[0]}
    for launch in session.launches:
        parts = {f"d{name}" for name in op.parameters} & launch.arguments.keys()
        assert all(launch.arguments[x] for x in parts)
        rest = launch.arguments.keys() - parts
        assert {x: launch.arguments[x] for x in rest} == {x: known.get(x, 0) for x in rest}
        assert (launch.block, launch.shared, launch.stream) == ((cuda.THREADS, 1, 1), 0, STREAM)
        assert launch.n_bytes == 8 * len(launch.arguments)


@pytest.mark.parametrize(
    ("sizes", "blocks"),
    [
        ({"count": 2**20}, (1024, 1)),
        ({"count": 2**20 + 1}, (1025, 1)),
        ({"batch": 8, "steps": 1024, "channels": 2048}, (1024, 2)),
        ({"batch": 1, "steps": 512, "channels": 768}, (512, 1)),
        ({"rows": 8192, "heads": 40, "n": 64}, (683, 3)),
        ({"rows": 8192, "heads": 33, "n": 24}, (1024, 2)),
        ({"rows": 8192, "heads": 32, "n": 64, "dk_k": torch.empty(512, 2048, device="meta")}, (512, 2)),
    ],
)
def test_the_grid_of_a_whole_gpu(sizes, blocks, monkeypatch):
    monkeypatch.setattr(cuda, "BLOCKS", 2048)
    assert cuda.grid(sizes) == blocks


def test_gradients_that_are_not_wanted_are_null(case, session):
    first, *rest = make(case, SHAPE, FP32)
    outputs = on_cuda(case)(first.requires_grad_(), *rest)
    outputs[0].sum().backward()
    launch = session.launches[-1]
    names = {f"d{x}" for x in case.op.tensors} & launch.arguments.keys()
    assert {x for x in names if launch.arguments[x]} == {f"d{case.op.tensors[0]}"}


@pytest.mark.parametrize("change", [strided, misaligned])
def test_tensors_that_are_not_contiguous_or_not_aligned(case, change):
    assert_right(case, change=lambda x: change(x) if x.dim() > 2 and x.shape[1] > 1 and x.is_floating_point() else x)


@pytest.mark.parametrize("shape", [(2, 0, 2, 8), (2, 5, 0, 8)], ids=str)
def test_nothing_to_do_launches_nothing(case, shape, session, poisoned):
    arguments = make(case, shape, FP32)
    _, grads = run(on_cuda(case), arguments)
    assert session.launches == []
    assert not any(x.any() for x in grads if x is not None)


@pytest.mark.parametrize("version", models.VERSIONS)
def test_a_whole_model_launches_them_in_every_layer(version, session):
    """on_stub.py compares the losses and the gradients of the same models."""
    model = models.adapted(version, FP32, "cuda")
    loss_sum(model, models.packed_batch())[0].backward()
    names = [x.kernel for x in session.launches if x.kernel in PROGRAMS["fused"].kernels]
    own = {
        6: {"token_mix": 3, "wkv6_output": 1, "relu_squared": 1, "gated": 1},
        7: {"token_mix": 2, "wkv7_arguments": 1, "wkv7_output": 1, "relu_squared": 1},
    }[version]
    layers = len(model.blocks)
    expected = {f"{x}_{part}": layers * count for x, count in own.items() for part in ("forward", "backward")}
    expected["token_mix_backward"] -= {6: 2, 7: 1}[version]  # nothing is trained below the first layer's time mix
    assert {x: names.count(x) for x in names} == expected


@pytest.mark.parametrize(
    ("name", "shape", "dtype", "said"),
    [
        ("wkv7_output", (1, 2, 3, 12), FP32, "the last size is 12, they take multiples of 8"),
        ("wkv6_output", (1, 2, 1, 264), FP32, "the head size is 264, they take up to 256"),
        ("six mixes", (1, 2, 1, 12), FP32, "the last size is 12, they take multiples of 8"),
        ("gated", (1, 2, 1, 12), torch.float16, "the tensors are torch.float16, they take float32 and bfloat16"),
    ],
)
def test_what_the_kernels_do_not_take_is_computed_without_them(name, shape, dtype, said, session, caplog):
    fused._unusable.cache_clear()
    fused._announce.cache_clear()
    with caplog.at_level(logging.WARNING, logger="rwkv_miss"):
        on_cuda(CASES[name])(*make(CASES[name], shape, dtype))
    assert session.launches == []
    assert said in caplog.text


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (swapped_arguments, "out of bounds|error|: .* of "),
        (swapped_sizes, "out of bounds|not aligned|__trap"),
        (wrong_grid, "__trap"),
        (wrong_block, "__trap"),
    ],
)
@pytest.mark.parametrize("name", ["six mixes", "wkv7_arguments", "wkv7_output", "wkv6_output"])
def test_a_launch_that_is_wrong_is_noticed(name, change, found, session, change_launches):
    assert_right(CASES[name], (2, 21, 5, 40))
    change_launches(change)
    with pytest.raises((AssertionError, driver.DriverError)) as error:
        assert_right(CASES[name], (2, 21, 5, 40))
    assert re.search(found, "; ".join([str(error.value), *session.failures]))
    session.failures.clear()
