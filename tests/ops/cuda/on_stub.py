"""The CUDA backend from `wkv7(..., backend="cuda")` through cubin, module and launch to results and gradients, with a
driver that runs the emulated kernels on host memory. Run by test_launch.py, in a process of its own."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import logging
import os
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rwkv_miss.errors import UserError
from rwkv_miss.ops import wkv7
from rwkv_miss.ops.arguments import announce
from rwkv_miss.ops.cuda import driver, nvrtc
from rwkv_miss.ops.cuda import wkv7 as cuda_wkv7
from tests.ops.cuda.stub import connect, read_manifest
from tests.ops.wkv7_cases import assert_close, assert_matches_reference, make_inputs, make_weights, odd_starts, run

OP = importlib.import_module("rwkv_miss.ops.wkv7")
FP32, BF16 = torch.float32, torch.bfloat16
STREAM = 0x5EED0
on_cuda = functools.partial(wkv7, backend="cuda")


@pytest.fixture(scope="session")
def library():
    return ctypes.CDLL("libcuda.so.1")


@pytest.fixture(scope="session")
def session(library):
    cuda_wkv7.forward_op.register_kernel("cpu")(cuda_wkv7.forward)
    cuda_wkv7.backward_op.register_kernel("cpu")(cuda_wkv7.backward)
    return connect(library, read_manifest(Path(os.environ["STUB_MANIFEST"])))


@pytest.fixture(autouse=True)
def gpu(session, library, monkeypatch):
    """CPU tensors count as tensors on device `gpu.device`, where torch's current stream is `gpu.stream`."""
    place = SimpleNamespace(device=0, stream=STREAM)
    monkeypatch.setattr(driver, "refused", lambda device: None)
    monkeypatch.setattr(driver, "location", lambda device: (place.device, place.stream))

    def compile_here(source, *_):
        raise AssertionError(f"{source} is not in the cache; NVRTC crashes beside a stub driver")

    monkeypatch.setattr(nvrtc, "_compile", compile_here)
    session.launches.clear()
    session.failures.clear()
    yield place
    assert session.failures == []
    assert library.stub_contexts_left_current() == 0


@pytest.fixture
def forgetful():
    """What is kept for the life of the process is forgotten, before and after."""
    kept = (cuda_wkv7._kernels_or_reason, driver.capability, announce)
    for function in kept:
        function.cache_clear()
    yield
    for function in kept:
        function.cache_clear()


@pytest.fixture
def poisoned():
    """torch.empty and its kin return NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def case(n=16, dtype=FP32, n_steps=21):
    """Batch, heads and steps all differ: exchanged, they are noticed."""
    inputs, state = make_inputs(n_steps, n, dtype, batch=2, n_head=3)
    return inputs, state, odd_starts(n_steps)


@pytest.mark.parametrize("starts", [True, False])
@pytest.mark.parametrize(
    ("n", "dtype", "n_steps"),
    [(64, FP32, 33), (64, BF16, 33), (16, FP32, 1), (16, FP32, 16), (16, FP32, 257), (128, BF16, 17)],
)
def test_agrees_with_the_reference(session, n, dtype, n_steps, starts, poisoned):
    inputs, state, start = case(n, dtype, n_steps)
    assert_matches_reference(on_cuda, inputs, state, start if starts else None)
    assert [x.kernel for x in session.launches] == list(cuda_wkv7.KERNELS)


def test_no_state_is_zeros():
    inputs, state, start = case()
    y, last = on_cuda(*inputs, torch.zeros_like(state), start)
    y_none, last_none = on_cuda(*inputs, None, start)
    assert torch.equal(y, y_none) and torch.equal(last, last_none)


@pytest.mark.parametrize(("n", "blocks", "threads"), [(16, 1, 32), (64, 1, 128), (128, 4, 64)])
def test_the_launch_of_the_forward(session, n, blocks, threads):
    dtype = BF16 if n == 128 else FP32
    inputs, state, start = case(n, dtype)
    y, last, states, u = cuda_wkv7.forward(*inputs, state, start, True)
    (launch,) = session.launches
    assert (launch.grid, launch.block, launch.shared) == ((6, blocks, 1), (threads, 1, 1), 0)
    assert (launch.stream, launch.device, launch.n_bytes) == (STREAM, 0, 14 * 8)
    pointers = dict(zip("rzkvab", inputs, strict=True), state_in=state, seq_start=start)
    pointers |= {"y": y, "state_out": last, "saved_states": states, "saved_u": u}
    assert launch.arguments == {k: x.data_ptr() for k, x in pointers.items()} | {"steps": 21, "heads": 3}
    assert states.shape == (2, 3, 2, n, n) and u.shape == inputs[0].shape


def test_the_launches_of_the_backward(session):
    inputs, state, start = case(64, BF16)
    _, last, states, u = cuda_wkv7.forward(*inputs, state, start, True)
    dy, dlast = torch.randn_like(inputs[0]), torch.randn_like(last)
    dr, dz, dk, dv, da, db, dstate = cuda_wkv7.backward(*inputs, start, states, u, dy, dlast)
    _, values, keys = session.launches
    r, z, k, v, a, b = inputs
    given = {"r": r, "z": z, "k": k, "a": a, "b": b, "seq_start": start, "dy": dy, "grad_state": dlast}
    given = {name: x.data_ptr() for name, x in given.items()} | {"steps": 21, "heads": 3}
    du = {"du": values.arguments["du"]}
    assert values.arguments == {**given, **du, "dv": dv.data_ptr(), "dstate": dstate.data_ptr()}
    more = {"v": v, "saved_states": states, "saved_u": u, "dr": dr, "dz": dz, "dk": dk, "da": da, "db": db}
    assert keys.arguments == {**given, **du, **{name: x.data_ptr() for name, x in more.items()}}
    for launch in (values, keys):
        assert (launch.grid, launch.block, launch.shared) == ((6, 1, 1), (128, 1, 1), 0)
        assert (launch.stream, launch.n_bytes) == (STREAM, 8 * len(launch.arguments))


def test_without_gradients_nothing_is_saved(session):
    inputs, state, _ = case()
    leaves = [x.requires_grad_() for x in inputs]
    with torch.no_grad():
        y, last = on_cuda(*leaves, state)
    (launch,) = session.launches
    assert [launch.arguments[name] for name in ("seq_start", "saved_states", "saved_u")] == [0, 0, 0]
    trained = on_cuda(*leaves, state)
    assert torch.equal(y, trained[0]) and torch.equal(last, trained[1])


@pytest.mark.parametrize("arrives", [0, 1])
def test_gradient_at_only_one_output(session, arrives):
    inputs, state, start = case()
    grads = []
    for function in (on_cuda, functools.partial(wkv7, backend="reference")):
        leaves = [x.clone().requires_grad_() for x in (*inputs, state)]
        output = function(*leaves, start)[arrives]
        grads.append(torch.autograd.grad(output.square().sum(), leaves, materialize_grads=True))
    for mine, exact in zip(*grads, strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-4, atol=1e-4)
    assert (session.launches[-1].arguments["grad_state"] == 0) == (arrives == 0)


def strided(x: torch.Tensor) -> torch.Tensor:
    x = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert not x.is_contiguous()
    return x


def misaligned(x: torch.Tensor) -> torch.Tensor:
    x = torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape)
    assert x.data_ptr() % 16 and x.storage_offset() == 1
    return x


@pytest.mark.parametrize("change", [strided, misaligned])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_inputs_that_are_not_contiguous_or_not_aligned(session, change, dtype):
    inputs, state, start = case(64, dtype)
    weights = make_weights(inputs, state)
    plain = run(on_cuda, inputs, state, start, weights)

    def changed(*leaves):
        return on_cuda(*(change(x) for x in leaves))

    other = run(changed, inputs, state, start, [change(x) for x in weights])
    assert all(map(torch.equal, plain, other))
    assert len(session.launches) == 6
    for launch in session.launches:
        assert all(x % 16 == 0 for name, x in launch.arguments.items() if name not in ("steps", "heads"))


@pytest.mark.parametrize("stream", [0, 0xABCD00])
def test_torchs_current_stream_is_passed_on(session, gpu, stream):
    gpu.stream = stream
    inputs, state, start = case()
    run(on_cuda, inputs, state, start, make_weights(inputs, state))
    assert [x.stream for x in session.launches] == [stream] * 3


def test_the_backward_in_another_thread(session, library):
    """As autograd runs it for CUDA tensors: there no context is current."""
    inputs, state, start = case()
    weights = make_weights(inputs, state)
    expected = run(on_cuda, inputs, state, start, weights)
    leaves = [x.clone().requires_grad_() for x in (*inputs, state)]
    outputs = on_cuda(*leaves, start)
    found = []

    def backward():
        found.extend(torch.autograd.grad(outputs, leaves, weights))
        found.append(library.stub_contexts_left_current())

    thread = threading.Thread(target=backward)
    thread.start()
    thread.join()
    assert found.pop() == 0
    assert all(map(torch.equal, found, expected[2:]))
    assert len({x.thread for x in session.launches[-3:]}) == 2


def test_each_device_has_its_own_modules(session, gpu):
    inputs, state, start = case()
    weights = make_weights(inputs, state)
    results, functions = [], []
    for device in (0, 1, 0):
        gpu.device = device
        session.launches.clear()
        results.append(run(on_cuda, inputs, state, start, weights))
        assert [x.device for x in session.launches] == [device] * 3
        functions.append([x.function for x in session.launches])
    assert functions[0] == functions[2]
    assert not set(functions[0]) & set(functions[1])
    loaded = [(device, v.architecture) for device, v in session.loaded if (v.n, v.io_bytes) == (16, 4)]
    assert set(loaded) == {(0, 90), (1, 75)}
    assert all(map(torch.equal, results[0], results[1]))


def test_modules_are_loaded_once(session, forgetful):
    inputs, state, start = case()
    before = len(session.loaded)
    for _ in range(3):
        run(on_cuda, inputs, state, start, make_weights(inputs, state))
    assert len(session.loaded) == before + 1


@pytest.mark.parametrize(("batch", "n_steps", "n_head"), [(2, 0, 3), (0, 5, 3), (2, 5, 0)])
def test_nothing_to_do_launches_nothing(session, batch, n_steps, n_head):
    inputs, state = make_inputs(n_steps, 16, batch=batch, n_head=n_head)
    weights = make_weights(inputs, state)
    y, last, *_, dstate = run(on_cuda, inputs, state, torch.zeros(batch, n_steps, dtype=torch.bool), weights)
    assert y.shape == inputs[0].shape
    assert torch.equal(last, state) and torch.equal(dstate, weights[1])
    assert on_cuda(*inputs, state)[1].data_ptr() != state.data_ptr() or state.numel() == 0
    assert session.launches == []


@pytest.mark.parametrize("n_steps", [0, 20])
def test_operators_pass_opcheck(n_steps):
    inputs, state, start = case(n_steps=n_steps)
    leaves = [x.requires_grad_() for x in (*inputs, state)]
    torch.library.opcheck(torch.ops.rwkv_miss.wkv7_cuda.default, (*leaves, start, True))
    detached = [x.detach() for x in leaves]
    torch.library.opcheck(torch.ops.rwkv_miss.wkv7_cuda.default, (*detached, None, False))
    y, last, states, u = torch.ops.rwkv_miss.wkv7_cuda(*detached, start, True)
    arguments = (*detached[:6], start, states, u, y, last)
    torch.library.opcheck(torch.ops.rwkv_miss.wkv7_cuda_backward.default, arguments)
    torch.library.opcheck(torch.ops.rwkv_miss.wkv7_cuda_backward.default, (*arguments[:-2], None, None))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_as_one_graph(dynamic):
    inputs, state, start = case()
    weights = make_weights(inputs, state)
    torch._dynamo.reset()
    compiled = torch.compile(on_cuda, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    eager = run(on_cuda, inputs, state, start, weights)
    assert_close(run(compiled, inputs, state, start, weights), eager, 1e-6)


def test_auto_takes_cuda_and_says_so(forgetful, caplog):
    with caplog.at_level(logging.INFO, logger="rwkv_miss"):
        assert [OP._choose(torch.device("cuda", 0), FP32, 16) for _ in range(2)] == ["cuda", "cuda"]
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [("INFO", "wkv7: using backend 'cuda'")]


def test_auto_takes_torch_where_cuda_cannot_be_used_and_says_why_once(caplog, forgetful):
    with caplog.at_level(logging.INFO, logger="rwkv_miss"):
        assert [OP._choose(torch.device("cuda", 0), FP32, 40) for _ in range(2)] == ["torch", "torch"]
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "using backend 'torch'; not 'cuda': the head size is 40, it takes 8, 16" in record.getMessage()


@pytest.mark.parametrize(
    ("n", "dtype", "found"), [(40, FP32, "the head size is 40, it takes 8,"), (16, torch.float64, "are torch.float64")]
)
def test_what_the_kernels_do_not_take_is_said(n, dtype, found):
    inputs, state = make_inputs(3, n, dtype)
    with pytest.raises(UserError, match=f"backend 'cuda' cannot be used: .*{found}"):
        on_cuda(*inputs, state)


def test_a_driver_that_is_too_old_is_told_which_is_needed(forgetful, library):
    inputs, state, _ = case()
    library.stub_set_driver_version(12040)
    try:
        with pytest.raises(UserError, match=r"is for CUDA 12\.4, NVRTC is of CUDA 13.*update the driver.*580\.65"):
            on_cuda(*inputs, state)
    finally:
        library.stub_set_driver_version(13000)


def test_an_error_of_the_driver_is_named_with_what_to_do(forgetful, session, monkeypatch):
    monkeypatch.setattr(cuda_wkv7, "compile_source", lambda *_: b"\x7fELF" + bytes(8192))
    inputs, state, _ = case()
    with pytest.raises(UserError, match="cuModuleLoadData: CUDA_ERROR_INVALID_IMAGE; the compiled kernel is damaged"):
        on_cuda(*inputs, state)
    assert session.failures == ["the image is none of the cubins"]
    session.failures.clear()


def test_a_device_that_is_not_there(forgetful, gpu):
    gpu.device = 2
    inputs, state, _ = case()
    with pytest.raises(UserError, match="cuDeviceGet: CUDA_ERROR_INVALID_DEVICE"):
        on_cuda(*inputs, state)


def swapped_arguments(monkeypatch):
    patch_launch(monkeypatch, lambda grid, block, args: (grid, block, [args[1], args[0], *args[2:]]))


def swapped_sizes(monkeypatch):
    patch_launch(monkeypatch, lambda grid, block, args: (grid, block, [*args[:-2], args[-1], args[-2]]))


def wrong_grid(monkeypatch):
    patch_launch(monkeypatch, lambda grid, block, args: ((grid[0], grid[1] + 1), block, args))


def small_grid(monkeypatch):
    patch_launch(monkeypatch, lambda grid, block, args: ((grid[0] // 3, grid[1]), block, args))


def wrong_block(monkeypatch):
    patch_launch(monkeypatch, lambda grid, block, args: (grid, block // 2, args))


def small_integers(monkeypatch):
    monkeypatch.setattr(driver.ctypes, "c_int64", ctypes.c_int32)


def no_context(monkeypatch):
    monkeypatch.setattr(driver, "_current", lambda index: contextlib.nullcontext())


def another_devices_context(monkeypatch):
    context = driver._context
    monkeypatch.setattr(driver, "_context", lambda index: context(1 - index))


def patch_launch(monkeypatch, change):
    real = driver.launch
    monkeypatch.setattr(driver, "launch", lambda f, device, *rest: real(f, device, *change(*rest)))


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        (swapped_arguments, "y: relative error"),
        (swapped_sizes, "out of bounds"),
        (wrong_grid, "__trap"),
        (small_grid, "out of bounds"),
        (wrong_block, "__trap"),
        (small_integers, "56 bytes of parameters, 14 parameters of 8 bytes"),
        (no_context, "CUDA_ERROR_INVALID_CONTEXT"),
        (another_devices_context, "CUDA_ERROR_INVALID_CONTEXT"),
    ],
)
def test_a_planted_fault_is_noticed(fault, found, session, monkeypatch):
    inputs, state, start = case()
    assert_matches_reference(on_cuda, inputs, state, start)
    fault(monkeypatch)
    with pytest.raises((AssertionError, driver.DriverError)) as error:
        assert_matches_reference(on_cuda, inputs, state, start)
    assert found in "; ".join([str(error.value), *session.failures])
    session.failures.clear()
