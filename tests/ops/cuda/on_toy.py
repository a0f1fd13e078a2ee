"""The kernel of toy.cu, added as CONTRIBUTING.md describes, end to end: from its Python function through cubin, module
and launch to results and gradients. test_launch.py runs this file, as it runs on_stub.py."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from rwkv_miss.errors import UserError
from rwkv_miss.ops.cuda import driver, kernel
from tests.ops.cuda import toy
from tests.ops.cuda.mistakes import swapped_arguments, wrong_block
from tests.ops.cuda.stub_fixtures import STREAM
from tests.ops.cuda.toy import THREADS, TOY, squared_relu

FP32, BF16 = torch.float32, torch.bfloat16
COUNTS = (1, THREADS - 1, THREADS, THREADS + 1, 1000)


def draw(count: int, dtype: torch.dtype = FP32) -> tuple[torch.Tensor, torch.Tensor]:
    """x and a gradient of y, in which no two elements are the same."""
    generator = torch.Generator().manual_seed(count)
    return tuple(torch.randn(2, count, generator=generator).to(dtype))


def assert_right(x: torch.Tensor, dy: torch.Tensor) -> None:
    """y and dx are those of PyTorch's operations, computed in float32 and rounded once."""
    x.requires_grad_()
    y = squared_relu(x)
    (dx,) = torch.autograd.grad(y, x, dy)
    wide = x.detach().float()
    exact = wide.relu().square(), 2 * wide.relu() * dy.float()
    for name, found, expected in zip(("y", "dx"), (y, dx), exact, strict=True):
        assert torch.equal(found, expected.to(x.dtype)), f"{name} is wrong"


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("count", COUNTS)
def test_results_and_gradients(count, dtype, session, poisoned):
    assert_right(*draw(count, dtype))
    assert [x.kernel for x in session.launches] == list(TOY.kernels)


def test_the_launch(session):
    x, _ = draw(1000)
    y = squared_relu(x)
    (launch,) = session.launches
    assert (launch.grid, launch.block, launch.shared) == ((8, 1, 1), (THREADS, 1, 1), 0)
    assert (launch.stream, launch.device) == (STREAM, 0)
    assert launch.arguments == {"x": x.data_ptr(), "y": y.data_ptr(), "count": 1000}


def test_it_comes_from_the_cache_and_is_loaded_once_for_each_device(session, gpu, forgetful):
    """Nothing can be compiled in this process: the fixture `gpu` sees to that."""
    before = len(session.loaded)
    for device in (0, 1, 0, 1):
        gpu.device = device
        assert_right(*draw(5))
    loaded = [(device, v.program, v.architecture) for device, v in session.loaded[before:]]
    assert loaded == [(0, "toy", 90), (1, "toy", 75)]
    assert [x.device for x in session.launches] == [0, 0, 1, 1, 0, 0, 1, 1]


def test_inputs_that_are_not_contiguous_or_not_aligned(session):
    x, dy = draw(600)
    assert_right(x.view(20, 30).mT, dy.view(30, 20))
    assert_right(x[1:].detach(), dy[1:])
    assert all(v % 16 == 0 for launch in session.launches for name, v in launch.arguments.items() if name != "count")


def test_nothing_to_do_launches_nothing(session):
    assert_right(*draw(0))
    assert session.launches == []


def test_the_operators_pass_opcheck():
    x, dy = draw(5)
    torch.library.opcheck(torch.ops.rwkv_miss.squared_relu_cuda.default, (x.requires_grad_(),))
    torch.library.opcheck(torch.ops.rwkv_miss.squared_relu_cuda_backward.default, (x.detach(), dy))


def test_what_it_does_not_take_is_said():
    with pytest.raises(UserError, match=r"x is torch\.float64; expected float32 or bfloat16"):
        squared_relu(draw(5, torch.float64)[0])


def test_a_gpu_that_it_is_not_written_for_is_said(gpu, monkeypatch, forgetful):
    monkeypatch.setattr(toy, "TOY", dataclasses.replace(TOY, oldest=(8, 0)))
    assert_right(*draw(5))
    gpu.device = 1
    with pytest.raises(UserError, match=r"cannot be used: this GPU is sm_75, toy\.cu is for sm_80 and later"):
        squared_relu(draw(5)[0])


def test_a_gpu_with_too_little_shared_memory_is_said(gpu, monkeypatch, forgetful):
    monkeypatch.setattr(toy, "TOY", dataclasses.replace(TOY, shared={FP32: {next(iter(TOY.kernels)): 65537}}))
    assert_right(*draw(5))
    gpu.device = 1
    with pytest.raises(UserError, match=r"a block of toy\.cu takes 65537 bytes of shared memory, this GPU has 65536"):
        squared_relu(draw(5)[0])


def small_size(grid, block, arguments):
    return grid, block, [*arguments[:-1], arguments[-1] - 1]


def large_size(grid, block, arguments):
    return grid, block, [*arguments[:-1], arguments[-1] + 1]


def small_grid(grid, block, arguments):
    return (grid[0] - 1, grid[1]), block, arguments


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (swapped_arguments, "y is wrong"),
        (small_size, "y is wrong"),
        (large_size, "out of bounds: 2404 bytes by the sizes given, the tensor has 2400"),
        (small_grid, "y is wrong"),
        (wrong_block, "__trap"),
    ],
)
def test_a_launch_that_is_wrong_is_noticed(change, found, session, change_launches, poisoned):
    assert_right(*draw(600))
    change_launches(change)
    with pytest.raises((AssertionError, driver.DriverError)) as error:
        assert_right(*draw(600))
    assert found in "; ".join([str(error.value), *session.failures])
    session.failures.clear()


def test_swapped_names_are_noticed(monkeypatch):
    monkeypatch.setitem(TOY.kernels, "squared_relu_backward", "dy x dx count")
    with pytest.raises(AssertionError, match="dx is wrong"):
        assert_right(*draw(600))


def test_a_tensor_that_is_not_ready_is_our_own_mistake(monkeypatch):
    monkeypatch.setattr(kernel, "ready", lambda x: x)
    with pytest.raises(AssertionError, match="squared_relu_forward"):
        squared_relu(draw(600)[0][1:])
