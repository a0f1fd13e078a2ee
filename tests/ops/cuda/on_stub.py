"""The scalar CUDA kernels end to end: from `wkv6` and `wkv7` (backend "cuda_scalar") through cubin, module and launch
to results and gradients, with a stub driver that runs the emulated kernels on host memory. test_launch.py runs this
file, in a process of its own, with the fixtures of stub_fixtures.py."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import threading
from collections.abc import Callable

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from rwkv_miss.errors import UserError
from rwkv_miss.ops.cuda import driver, kernel
from rwkv_miss.ops.cuda.programs import PROGRAMS
from rwkv_miss.ops.dispatch import choose
from rwkv_miss.ops.fused_operators import OPS
from rwkv_miss.planning.launches import Trace
from tests.helpers import loss_sum
from tests.model import test_chunks as models
from tests.ops.cases import WKV6, WKV7, WkvCase, odd_starts, run
from tests.ops.cuda.mistakes import swapped_arguments, swapped_sizes, wrong_block, wrong_grid
from tests.ops.cuda.stub_fixtures import STREAM

FP32, BF16 = torch.float32, torch.bfloat16
# The driver's functions that one launch calls.
LAUNCH = ["cuCtxPushCurrent", "cuLaunchKernel", "cuCtxPopCurrent"]
torchs_location = driver.location


def on_cuda(wkv: WkvCase) -> Callable:
    return wkv.with_backend("cuda_scalar")


def case(wkv: WkvCase, n=16, dtype=FP32, n_steps=21):
    """Inputs, a state and seq_start. The numbers of sequences, heads and steps all differ, so that a kernel which is
    given one in the place of another is noticed."""
    inputs, state = wkv.make_inputs(n_steps, n, dtype, batch=2, n_head=3)
    return inputs, state, odd_starts(n_steps)


def pointers(**tensors: torch.Tensor | None) -> dict[str, int]:
    """The arguments that the stub records for these tensors: their addresses, 0 for None."""
    return {name: 0 if x is None else x.data_ptr() for name, x in tensors.items()}


@pytest.mark.parametrize("starts", [True, False])
@pytest.mark.parametrize(
    ("n", "dtype", "n_steps"),
    [(64, BF16, 33), (16, FP32, 1), (16, FP32, 16), (16, FP32, 257), (128, BF16, 17)],
)
def test_agrees_with_the_reference(wkv, session, n, dtype, n_steps, starts, poisoned):
    inputs, state, start = case(wkv, n, dtype, n_steps)
    wkv.assert_matches_reference(on_cuda(wkv), inputs, state, start if starts else None)
    assert [x.kernel for x in session.launches] == list(PROGRAMS[wkv.name].kernels)


@pytest.mark.parametrize("version", models.VERSIONS)
def test_a_packed_row_of_a_whole_model_is_its_documents_alone(version, session):
    models.test_a_document_in_a_packed_row_is_the_document_alone(version, "cuda", FP32, 1e-6)
    kernels = PROGRAMS[f"wkv{version}"].kernels
    assert sum(x.kernel in kernels for x in session.launches) == 3 * 3 * 8  # layers, kernels, rows


@pytest.mark.parametrize("version", models.VERSIONS)
def test_a_step_launches_as_many_kernels_as_are_counted(version, session):
    model = models.adapted(version, FP32, "cuda")
    with Trace() as trace:
        loss_sum(model, models.packed_batch())[0].backward()
    fused = {f"{op.name}{x}" for op in OPS for x in ("", "_backward")}
    counted = sum(x.launches for x in trace.operations if "_cuda" in x.name or x.name in fused)
    assert counted == len(session.launches) > 0


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("version", models.VERSIONS)
def test_a_whole_model_has_the_gradients_of_float64(version, checkpointing):
    """For packed rows, from a first state to a last one, at once and in chunks."""

    def gradients(dtype, backend, chunk_len):
        model = models.adapted(version, dtype, backend)
        model.gradient_checkpointing = checkpointing
        before = models.first_state(model)
        loss, after = loss_sum(model, models.packed_batch(), before, chunk_len)
        return models.outcome(model, loss, before, after)

    exact = gradients(torch.float64, "torch", None)
    for chunk_len in (None, 17):
        found = {name: x.double() for name, x in gradients(FP32, "cuda", chunk_len).items()}
        models.assert_close(found, exact, 3e-6)


def test_no_state_is_zeros(wkv):
    inputs, state, start = case(wkv)
    y, last = on_cuda(wkv)(*inputs, torch.zeros_like(state), start)
    y_none, last_none = on_cuda(wkv)(*inputs, None, start)
    assert torch.equal(y, y_none) and torch.equal(last, last_none)


@pytest.mark.parametrize(("n", "blocks", "threads"), [(16, 1, 32), (64, 1, 128), (128, 4, 64)])
def test_the_launch_of_the_forward(wkv, session, n, blocks, threads):
    inputs, state, start = case(wkv, n, FP32 if n == 16 else BF16)
    y, last, states, *saved = getattr(torch.ops.rwkv_miss, f"{wkv.name}_cuda")(*inputs, state, start, True)
    (launch,) = session.launches
    assert (launch.grid, launch.block, launch.shared) == ((6, blocks, 1), (threads, 1, 1), 0)
    assert (launch.stream, launch.device, launch.n_bytes) == (STREAM, 0, 8 * len(launch.arguments))
    given = dict(zip(wkv.inputs, inputs, strict=True), state_in=state, seq_start=start)
    given |= dict(zip(("saved_states", "saved_u"), (states, *saved), strict=False))
    assert launch.arguments == pointers(**given, y=y, state_out=last) | {"steps": 21, "heads": 3}
    assert states.shape == (2, 3, 2, n, n)
    assert [x.shape for x in saved] == ([] if wkv is WKV6 else [inputs[0].shape])


def test_the_launches_of_the_backward(wkv, session):
    inputs, state, start = case(wkv, 64, BF16)
    forward, backward = (getattr(torch.ops.rwkv_miss, f"{wkv.name}_cuda{part}") for part in ("", "_backward"))
    _, last, *saved = forward(*inputs, state, start, True)
    dy, dlast = torch.randn_like(inputs[0]), torch.randn_like(last)
    *grads, dstate = backward(*inputs, start, *saved, dy, dlast)
    _, values, keys = session.launches
    known = dict(zip(wkv.inputs, inputs, strict=True), seq_start=start, dy=dy, grad_state=dlast, dstate=dstate)
    known |= dict(zip(("saved_states", "saved_u"), saved, strict=False))
    known |= {f"d{name}": x for name, x in zip(wkv.inputs, grads, strict=True)}
    known = pointers(**known) | {"steps": 21, "heads": 3}
    # du is memory that the backward makes for itself: with WKV-7 one kernel hands it to the next, with WKV-6 it is then
    # summed over the batch.
    known["du"] = keys.arguments["du"]
    assert known["du"] not in [x.data_ptr() for x in grads]
    for launch in (values, keys):
        assert launch.arguments == {name: known[name] for name in launch.arguments}
        assert (launch.grid, launch.block, launch.shared) == ((6, 1, 1), (128, 1, 1), 0)
        assert (launch.stream, launch.n_bytes) == (STREAM, 8 * len(launch.arguments))


def test_without_gradients_nothing_is_saved(wkv, session):
    inputs, state, _ = case(wkv)
    leaves = [x.requires_grad_() for x in inputs]
    with torch.no_grad():
        y, last = on_cuda(wkv)(*leaves, state)
    (launch,) = session.launches
    absent = [x for name, x in launch.arguments.items() if name == "seq_start" or name.startswith("saved_")]
    assert absent == [0] * (2 if wkv is WKV6 else 3)
    trained = on_cuda(wkv)(*leaves, state)
    assert torch.equal(y, trained[0]) and torch.equal(last, trained[1])


@pytest.mark.parametrize("arrives", [0, 1])
def test_gradient_at_only_one_output(wkv, session, arrives):
    inputs, state, start = case(wkv)
    grads = []
    for function in (on_cuda(wkv), wkv.with_backend("reference")):
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
@pytest.mark.parametrize(("n", "dtype"), [(16, FP32), (64, BF16)])
def test_inputs_that_are_not_contiguous_or_not_aligned(wkv, session, change, n, dtype):
    inputs, state, start = case(wkv, n, dtype)
    weights = wkv.make_weights(inputs, state)
    plain = run(on_cuda(wkv), inputs, state, start, weights)

    def changed(*leaves):
        return on_cuda(wkv)(*(change(x) for x in leaves))

    other = run(changed, inputs, state, start, [change(x) for x in weights])
    assert all(map(torch.equal, plain, other))
    assert other[0].is_contiguous()
    assert len(session.launches) == 6
    for launch in session.launches:
        assert all(x % 16 == 0 for name, x in launch.arguments.items() if name not in ("steps", "heads"))


@pytest.mark.parametrize("stream", [0, 0xABCD00])
def test_torchs_current_stream_is_passed_on(wkv, session, gpu, stream):
    gpu.stream = stream
    inputs, state, start = case(wkv)
    run(on_cuda(wkv), inputs, state, start, wkv.make_weights(inputs, state))
    assert [x.stream for x in session.launches] == [stream] * 3


def test_the_backward_in_another_thread(wkv, session, library):
    """Autograd runs the backward of CUDA tensors in a thread of its own, where no context is current."""
    inputs, state, start = case(wkv)
    weights = wkv.make_weights(inputs, state)
    expected = run(on_cuda(wkv), inputs, state, start, weights)
    leaves = [x.clone().requires_grad_() for x in (*inputs, state)]
    outputs = on_cuda(wkv)(*leaves, start)
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


def test_each_device_has_its_own_modules(wkv, session, gpu):
    inputs, state, start = case(wkv)
    weights = wkv.make_weights(inputs, state)
    results, functions = [], []
    for device in (0, 1, 0):
        gpu.device = device
        session.launches.clear()
        results.append(run(on_cuda(wkv), inputs, state, start, weights))
        assert [x.device for x in session.launches] == [device] * 3
        functions.append([x.function for x in session.launches])
    assert functions[0] == functions[2]
    assert not set(functions[0]) & set(functions[1])
    variant = wkv.name, PROGRAMS[wkv.name].variants[FP32, 16]
    loaded = {(device, v.architecture) for device, v in session.loaded if (v.program, v.options) == variant}
    assert loaded == {(0, 90), (1, 75)}
    assert all(map(torch.equal, results[0], results[1]))


def test_another_device_than_the_current_leaves_the_current_one(wkv, session, gpu, library):
    """The tensors are on device 1 while device 0 is torch's current one: its context is current before and after."""
    current, found = ctypes.c_void_p(), ctypes.c_void_p()
    library.cuDevicePrimaryCtxRetain(ctypes.byref(current), 0)
    library.cuCtxPushCurrent(current)
    gpu.device = 1
    inputs, state, start = case(wkv)
    run(on_cuda(wkv), inputs, state, start, wkv.make_weights(inputs, state))
    assert [x.device for x in session.launches] == [1, 1, 1]
    assert library.stub_contexts_left_current() == 1
    library.cuCtxPopCurrent(ctypes.byref(found))
    assert found.value == current.value


def test_modules_are_loaded_once(wkv, session, forgetful):
    inputs, state, start = case(wkv)
    before = len(session.loaded)
    for _ in range(3):
        run(on_cuda(wkv), inputs, state, start, wkv.make_weights(inputs, state))
    assert len(session.loaded) == before + 1


def test_what_is_recorded_into_a_graph_is_launches_alone(wkv, library, gpu, calls):
    """The driver is asked for no allocation, synchronisation or event: nothing that graph capture could forbid."""
    inputs, state, start = case(wkv)
    weights = wkv.make_weights(inputs, state)
    expected = run(on_cuda(wkv), inputs, state, start, weights)
    calls()
    library.stub_capture(ctypes.c_void_p(gpu.stream))
    try:
        found = run(on_cuda(wkv), inputs, state, start, weights)
    finally:
        library.stub_capture(None)
    assert calls() == LAUNCH * 3
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("backend", ["cuda_scalar", "auto"])
def test_a_first_call_inside_a_recording_is_refused_and_the_next_outside_works(wkv, library, gpu, forgetful, backend):
    inputs, state, start = case(wkv)
    library.stub_capture(ctypes.c_void_p(gpu.stream))
    try:
        with pytest.raises(UserError, match="cannot be recorded into a CUDA graph: run the same once before"):
            if backend == "cuda_scalar":
                on_cuda(wkv)(*inputs, state, start)
            else:
                choose(wkv.name, torch.device("cuda", 0), FP32, 16)
    finally:
        library.stub_capture(None)
    wkv.assert_matches_reference(on_cuda(wkv), inputs, state, start)


class InWorker(Dataset):
    """A data set whose elements are what a DataLoader's process finds: the CUDA backend's error, the driver's functions
    that were called until then, and y of the "torch" backend."""

    def __init__(self, wkv, inputs, calls):
        self.wkv, self.inputs, self.calls = wkv, inputs, calls

    def __len__(self):
        return 2

    def __getitem__(self, _):
        self.calls()
        try:
            on_cuda(self.wkv)(*self.inputs)
            error = None
        except RuntimeError as found:
            error = str(found)
        return error, self.calls(), self.wkv.op(*self.inputs, backend="torch")[0]


def test_a_worker_that_was_forked_gets_torchs_error_and_its_parent_goes_on(wkv, session, calls, monkeypatch):
    inputs, state, start = case(wkv)
    weights = wkv.make_weights(inputs, state)
    expected = run(on_cuda(wkv), inputs, state, start, weights)
    parent, in_parent = os.getpid(), driver.location
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: os.getpid() != parent)
    monkeypatch.setattr(driver, "location", lambda x: (in_parent if os.getpid() == parent else torchs_location)(x))
    loader = DataLoader(
        InWorker(wkv, inputs, calls), batch_size=None, num_workers=1, multiprocessing_context="fork", timeout=60
    )
    for error, called, y in loader:
        assert "Cannot re-initialize CUDA in forked subprocess" in error
        assert called == []
        assert torch.equal(y, wkv.op(*inputs, backend="torch")[0])
    calls()
    assert all(map(torch.equal, run(on_cuda(wkv), inputs, state, start, weights), expected))
    assert calls() == LAUNCH * 3


@pytest.mark.parametrize(("batch", "n_steps", "n_head"), [(2, 0, 3), (0, 5, 3), (2, 5, 0)])
def test_nothing_to_do_launches_nothing(wkv, session, batch, n_steps, n_head, poisoned):
    inputs, state = wkv.make_inputs(n_steps, 16, batch=batch, n_head=n_head)
    weights = wkv.make_weights(inputs, state)
    start = torch.zeros(batch, n_steps, dtype=torch.bool)
    y, last, *grads, dstate = run(on_cuda(wkv), inputs, state, start, weights)
    assert y.shape == inputs[0].shape
    assert torch.equal(last, state) and torch.equal(dstate, weights[1]) and not any(x.any() for x in grads)
    assert on_cuda(wkv)(*inputs, state)[1].data_ptr() != state.data_ptr() or state.numel() == 0
    assert session.launches == []


@pytest.mark.parametrize("n_steps", [0, 20])
def test_operators_pass_opcheck(wkv, n_steps):
    wkv.opcheck("cuda", *case(wkv, n_steps=n_steps))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_as_one_graph(wkv, dynamic):
    inputs, state, start = case(wkv)
    weights = wkv.make_weights(inputs, state)
    torch._dynamo.reset()
    compiled = torch.compile(on_cuda(wkv), fullgraph=True, backend="aot_eager", dynamic=dynamic)
    eager = run(on_cuda(wkv), inputs, state, start, weights)
    wkv.assert_close(run(compiled, inputs, state, start, weights), eager, 1e-6)


def test_auto_takes_cuda_and_says_so(wkv, forgetful, caplog):
    with caplog.at_level(logging.INFO, logger="rwkv_miss"):
        assert [choose(wkv.name, torch.device("cuda", 0), FP32, 16) for _ in range(2)] == ["cuda", "cuda"]
    reason = "the tensors are torch.float32, it takes bfloat16" if wkv is WKV7 else "there is none for wkv6"
    said = f"{wkv.name}: using backend 'cuda'; scalar kernels; no chunked one: {reason}"
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [("INFO", said)]


def test_auto_takes_torch_where_cuda_cannot_be_used_and_says_why_once(wkv, caplog, forgetful):
    """The head size of 12 is one that "fla", should fla-core be installed, does not take either."""
    with caplog.at_level(logging.INFO, logger="rwkv_miss"):
        assert [choose(wkv.name, torch.device("cuda", 0), FP32, 12) for _ in range(2)] == ["torch", "torch"]
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "using backend 'torch'; not 'cuda': the head size is 12, it takes 8, 16" in record.getMessage()


@pytest.mark.parametrize(
    ("n", "dtype", "found"), [(40, FP32, "the head size is 40, it takes 8,"), (16, torch.float64, "are torch.float64")]
)
def test_what_the_kernels_do_not_take_is_said(wkv, n, dtype, found):
    inputs, state = wkv.make_inputs(3, n, dtype)
    with pytest.raises(UserError, match=f"backend 'cuda_scalar' cannot be used: .*{found}"):
        on_cuda(wkv)(*inputs, state)


def test_a_driver_that_is_too_old_is_told_which_is_needed(forgetful, library):
    inputs, state, _ = case(WKV7)
    library.stub_set_driver_version(12040)
    try:
        with pytest.raises(UserError, match=r"is for CUDA 12\.4, NVRTC is of CUDA 13.*update the driver.*580\.65"):
            on_cuda(WKV7)(*inputs, state)
    finally:
        library.stub_set_driver_version(13000)


def test_an_error_of_the_driver_is_named_with_what_to_do(forgetful, session, monkeypatch):
    monkeypatch.setattr(kernel, "compile_source", lambda *_: b"\x7fELF" + bytes(8192))
    inputs, state, _ = case(WKV7)
    with pytest.raises(UserError, match="cuModuleLoadData: CUDA_ERROR_INVALID_IMAGE; the compiled kernel is damaged"):
        on_cuda(WKV7)(*inputs, state)
    assert session.failures == ["the image is none of the cubins"]
    session.failures.clear()


def test_a_device_that_is_not_there(forgetful, gpu):
    gpu.device = 2
    inputs, state, _ = case(WKV7)
    with pytest.raises(UserError, match="cuDeviceGet: CUDA_ERROR_INVALID_DEVICE"):
        on_cuda(WKV7)(*inputs, state)


def small_grid(grid, block, arguments):
    return (grid[0] // 3, grid[1]), block, arguments


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (swapped_arguments, "y: error"),
        (swapped_sizes, "out of bounds"),
        (wrong_grid, "__trap"),
        (small_grid, "out of bounds"),
        (wrong_block, "__trap"),
    ],
)
def test_a_launch_that_is_wrong_is_noticed(wkv, change, found, session, change_launches):
    assert_noticed(wkv, session, found, lambda: change_launches(change))


def small_integers(monkeypatch):
    monkeypatch.setattr(driver.ctypes, "c_int64", ctypes.c_int32)


def no_context(monkeypatch):
    monkeypatch.setattr(driver, "_current", lambda index: contextlib.nullcontext())


def another_devices_context(monkeypatch):
    context = driver._context
    monkeypatch.setattr(driver, "_context", lambda index: context(1 - index))


def names_out_of_order(monkeypatch):
    for op in ("wkv6", "wkv7"):
        kernels, name = PROGRAMS[op].kernels, f"{op}_backward_keys"
        changed = kernels[name].replace(" dk ", " d? ").replace(" dr ", " dk ").replace("d?", "dr")
        monkeypatch.setitem(kernels, name, changed)


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        (small_integers, "bytes of parameters, "),
        (no_context, "CUDA_ERROR_INVALID_CONTEXT"),
        (another_devices_context, "CUDA_ERROR_INVALID_CONTEXT"),
        (names_out_of_order, "dr: error"),
    ],
)
def test_a_planted_fault_is_noticed(wkv, fault, found, session, monkeypatch):
    assert_noticed(wkv, session, found, lambda: fault(monkeypatch))


def assert_noticed(wkv: WkvCase, session, found: str, plant: Callable[[], None]) -> None:
    """Results are right before `plant`; after it the stub or the comparison with the reference says `found`."""
    inputs, state, start = case(wkv)
    wkv.assert_matches_reference(on_cuda(wkv), inputs, state, start)
    plant()
    with pytest.raises((AssertionError, driver.DriverError)) as error:
        wkv.assert_matches_reference(on_cuda(wkv), inputs, state, start)
    assert found in "; ".join([str(error.value), *session.failures])
    session.failures.clear()
