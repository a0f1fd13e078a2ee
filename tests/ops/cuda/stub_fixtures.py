"""Fixtures of the tests that run on the stub driver (on_stub.py, on_toy.py): a pytest plugin of the process that
test_launch.py starts for them."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._library.custom_ops import OPDEFS

from rwkv_miss.ops import fused
from rwkv_miss.ops.cuda import driver, kernel, nvrtc
from rwkv_miss.ops.cuda import fused as cuda
from rwkv_miss.ops.dispatch import announce
from rwkv_miss.ops.fused_operators import OPS, launch_forward
from rwkv_miss.ops.library import LIBRARY
from tests.ops.cuda.emulated import EMULATED
from tests.ops.cuda.stub import connect, read_manifest

STREAM = 0x5EED0


@pytest.fixture(scope="session")
def library():
    library = ctypes.CDLL("libcuda.so.1")
    library.stub_calls.restype = ctypes.c_char_p
    return library


@pytest.fixture(scope="session")
def session(library):
    """What the stub sees (`stub.Stub`). The CUDA operators take CPU tensors from here on."""
    for name, op in OPDEFS.items():
        if name.startswith("rwkv_miss::") and "_cuda" in name:
            op.register_kernel("cpu")(op._init_fn)
    fused.KERNELS["cpu"] = fused.KERNELS["cuda"]
    for fused_op in OPS:
        LIBRARY.impl(fused_op.name, partial(launch_forward, fused_op, fused.KERNELS), "CPU")
    cuda.BLOCKS = 8  # in the emulator a block costs more than the rows that it goes through
    return connect(library, read_manifest(Path(os.environ["STUB_MANIFEST"])), EMULATED)


@pytest.fixture(autouse=True)
def gpu(session, library, monkeypatch):
    """CPU tensors count as tensors on device `gpu.device`, where torch's current stream is `gpu.stream`. A test that
    leaves a failure behind fails."""
    place = SimpleNamespace(device=0, stream=STREAM)
    monkeypatch.setattr(driver, "refused", lambda device: None)
    monkeypatch.setattr(driver, "location", lambda device: (place.device, place.stream))

    def compile_here(source, *_):
        raise AssertionError(f"{source} is not in the cache; NVRTC crashes beside a stub driver")

    monkeypatch.setattr(nvrtc, "_compile", compile_here)
    real = driver.launch

    def launch(function, device, grid, block, shared, arguments):
        session.tensors = {x.data_ptr(): x.nbytes for x in arguments if isinstance(x, torch.Tensor)}
        real(function, device, grid, block, shared, arguments)

    monkeypatch.setattr(driver, "launch", launch)
    session.launches.clear()
    session.failures.clear()
    yield place
    assert session.failures == []
    assert library.stub_contexts_left_current() == 0


@pytest.fixture
def forgetful():
    """Clears the caches of the process, before and after the test."""
    kept = (kernel.functions_or_reason, driver.capability, announce)
    for function in kept:
        function.cache_clear()
    yield
    for function in kept:
        function.cache_clear()


@pytest.fixture
def calls(library) -> Callable[[], list[str]]:
    """`calls()`: the names of the driver's functions that were called since `calls()` was last called."""

    def since() -> list[str]:
        names = library.stub_calls().decode().split()
        library.stub_forget_calls()
        return names

    since()
    return since


@pytest.fixture
def change_launches(monkeypatch) -> Callable[[Callable], None]:
    """`change_launches(change)`: from here on the driver is given what `change(grid, block, arguments)` returns."""

    def apply(change: Callable) -> None:
        real = driver.launch

        def changed(function, device, grid, block, shared, arguments):
            grid, block, arguments = change(grid, block, arguments)
            real(function, device, grid, block, shared, arguments)

        monkeypatch.setattr(driver, "launch", changed)

    return apply
