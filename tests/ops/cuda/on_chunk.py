"""The chunked WKV-7 end to end on the stub driver: `wkv7` takes it where it can, gives it what it needs, and has the
reference's results within the roundings of bfloat16. test_launch.py runs this file, with the fixtures of
stub_fixtures.py."""

from __future__ import annotations

import logging

import pytest
import torch

from rwkv_miss.ops.cuda import driver
from rwkv_miss.ops.cuda.programs import PROGRAMS
from rwkv_miss.ops.cuda.wkv import kernel_taken
from rwkv_miss.ops.dispatch import choose
from tests.helpers import loss_sum
from tests.model import test_chunks as models
from tests.ops.cases import WKV7, odd_starts, run
from tests.ops.cuda.mistakes import swapped_arguments, swapped_sizes, wrong_block, wrong_grid
from tests.ops.cuda.on_stub import pointers
from tests.ops.cuda.stub_fixtures import STREAM

FP32, BF16 = torch.float32, torch.bfloat16
TOLERANCE = 5e-3
on_cuda = WKV7.with_backend("cuda")


def case(n=64, n_steps=21):
    inputs, state = WKV7.make_inputs(n_steps, n, BF16, batch=2, n_head=3)
    return inputs, state, odd_starts(n_steps)


def assert_close_to_the_reference(inputs, state, start):
    weights = WKV7.make_weights(inputs, state)
    mine = run(on_cuda, inputs, state, start, weights)
    assert [x.dtype for x in mine] == [BF16, FP32, *[BF16] * 6, FP32]
    WKV7.assert_close(
        mine, run(WKV7.reference, [x.double() for x in inputs], state.double(), start, weights), TOLERANCE
    )


@pytest.mark.parametrize(("n", "n_steps", "starts"), [(64, 1, False), (64, 70, True), (32, 131, True), (128, 70, True)])
def test_agrees_with_the_reference(session, n, n_steps, starts, poisoned):
    inputs, state, start = case(n, n_steps)
    assert_close_to_the_reference(inputs, state, start if starts else None)
    assert [x.kernel for x in session.launches] == list(PROGRAMS["wkv7_chunk"].kernels)


def test_the_launches(session):
    inputs, state, start = case(n_steps=70)
    forward, backward = (getattr(torch.ops.rwkv_miss, f"wkv7_chunk_cuda{part}") for part in ("", "_backward"))
    y, last, states = forward(*inputs, state, start, True)
    dy, dlast = torch.randn_like(y), torch.randn_like(last)
    *grads, dstate = backward(*inputs, start, states, dy, dlast)
    assert (states.shape, states.dtype) == ((2, 3, 2, 64, 64), BF16)
    assert dstate.dtype == FP32
    shared = PROGRAMS["wkv7_chunk"].shared_bytes((BF16, 64))
    for launch in session.launches:
        assert (launch.grid, launch.block, launch.shared) == ((6, 1, 1), (128, 1, 1), shared[launch.kernel])
        assert (launch.stream, launch.n_bytes) == (STREAM, 8 * len(launch.arguments))
    known = dict(zip("rzkvab", inputs, strict=True), seq_start=start, state_in=state, y=y, state_out=last)
    known |= dict(zip(("dr", "dz", "dk", "dv", "da", "db"), grads, strict=True), dstate=dstate, saved_states=states)
    known = pointers(**known, dy=dy, grad_state=dlast) | {"steps": 70, "heads": 3}
    known["scratch"] = session.launches[1].arguments["scratch"]
    for launch in session.launches:
        assert launch.arguments == {name: known[name] for name in launch.arguments}


@pytest.mark.parametrize("chunk_len", [None, 17])
def test_a_whole_model_is_as_near_to_float64_as_bfloat16_is(session, chunk_len):
    """Packed rows, from a first state to a last one, at once and in chunks. All of the model rounds to bfloat16: the
    losses and gradients are as far from float64's as those of the "torch" backend in bfloat16, which rounds nothing
    inside the op."""

    def outcome(dtype, backend):
        model = models.adapted(7, dtype, backend, n_head=1, head_size=32)
        before = models.first_state(model)
        loss, after = loss_sum(model, models.packed_batch(), before, chunk_len)
        found = models.outcome(model, loss, before, after)
        return torch.cat([x.double().flatten() for name, x in found.items() if name != "loss"]), loss.item()

    exact, exact_loss = outcome(torch.float64, "torch")
    plain, plain_loss = outcome(BF16, "torch")
    mine, loss = outcome(BF16, "cuda")
    wkv7 = {x.kernel for x in session.launches} - set(PROGRAMS["fused"].kernels)
    assert wkv7 == set(PROGRAMS["wkv7_chunk"].kernels)
    assert abs(loss - exact_loss) < 2 * abs(plain_loss - exact_loss) + 1e-3 * exact_loss
    assert (mine - exact).norm() < 1.5 * (plain - exact).norm()


@pytest.mark.parametrize("chunk_len", [None, 17])
def test_a_training_has_the_losses_of_another_backend(session, chunk_len):
    """Packed rows, at once and in chunks, all in bfloat16, the adapters' weights too."""

    def losses(backend):
        model = models.adapted(7, BF16, backend, n_head=1, head_size=32)
        optimizer = torch.optim.AdamW(models.trained(model).values(), lr=0.02)
        found = []
        for _ in range(6):
            loss, _ = loss_sum(model, models.packed_batch(), None, chunk_len)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        return torch.tensor(found)

    expected, mine = losses("torch"), losses("cuda")
    assert {x.kernel for x in session.launches} >= set(PROGRAMS["wkv7_chunk"].kernels)
    assert expected[-1] < 0.7 * expected[0]
    torch.testing.assert_close(mine, expected, rtol=0.05, atol=0)  # roundings of weights add up from step to step
    torch.testing.assert_close(mine[:2], expected[:2], rtol=5e-3, atol=0)


@pytest.mark.parametrize(
    ("n_head", "n_steps", "starts", "blocks"),
    [(2, 1100, True, 3), (1, 600, True, 2), (4, 600, True, 1), (1, 511, True, 1), (1, 600, False, 1)],
)
def test_as_many_blocks_share_a_head_as_the_device_has_room_for(session, n_head, n_steps, starts, blocks, poisoned):
    """The stub's device runs 6 blocks at once. A share has 256 steps at least."""
    inputs, state = WKV7.make_inputs(n_steps, 32, BF16, batch=1, n_head=n_head)
    start = odd_starts(n_steps, 1)
    start[:, ::90] = True
    assert_close_to_the_reference(inputs, state, start if starts else None)
    assert [x.grid[1] for x in session.launches] == [blocks, blocks]


def test_inference_saves_nothing(session):
    inputs, state, _ = case()
    with torch.no_grad():
        on_cuda(*inputs, state)
    (launch,) = session.launches
    assert launch.arguments["saved_states"] == 0


@pytest.mark.parametrize(
    ("n", "dtype", "backend", "device", "kernel"),
    [
        (64, BF16, "cuda", 0, "wkv7_chunk_forward"),
        (64, BF16, "auto", 0, "wkv7_chunk_forward"),
        (64, BF16, "cuda_scalar", 0, "wkv7_forward"),
        (16, FP32, "cuda", 0, "wkv7_forward"),
        (16, FP32, "cuda", 1, "wkv7_forward"),
    ],
)
def test_which_kernel_is_taken(session, gpu, n, dtype, backend, device, kernel, monkeypatch):
    gpu.device = device
    monkeypatch.setattr("rwkv_miss.ops.dispatch.NATIVE", {"cpu": ("cuda",)})
    inputs, state = WKV7.make_inputs(3, n, dtype)
    WKV7.with_backend(backend)(*inputs, state)
    assert [x.kernel for x in session.launches] == [kernel]


def test_where_a_block_has_too_little_shared_memory(session, forgetful, monkeypatch):
    monkeypatch.setattr(driver, "shared_memory", lambda _: 99 * 1024)  # of sm_86, sm_89 and sm_120
    inputs, state = WKV7.make_inputs(3, 128, BF16)
    on_cuda(*inputs, state)
    assert [x.kernel for x in session.launches] == ["wkv7_forward"]
    said = kernel_taken("wkv7", torch.device("cuda", 0), BF16, 128)
    assert said.endswith("a block of wkv7_chunk.cu takes 165120 bytes of shared memory, this GPU has 101376")


@pytest.mark.parametrize(
    ("index", "dtype", "n", "said"),
    [
        (0, BF16, 64, "chunked kernels on tensor cores"),
        (0, FP32, 16, "scalar kernels; no chunked one: the tensors are torch.float32, it takes bfloat16"),
        (1, BF16, 64, "this GPU is sm_75, wkv7_chunk.cu is for sm_80 and later"),
        (0, BF16, 16, "the head size is 16, it takes 32, 64, 128"),
    ],
)
def test_auto_says_which_kernel_it_takes(gpu, index, dtype, n, said, forgetful, caplog, monkeypatch):
    gpu.device = index
    monkeypatch.setattr("rwkv_miss.ops.cuda.wkv.scalar_unusable", lambda *_: None)
    with caplog.at_level(logging.INFO, logger="rwkv_miss"):
        assert choose("wkv7", torch.device("cuda", 0), dtype, n) == "cuda"
    (record,) = caplog.records
    assert record.getMessage().startswith("wkv7: using backend 'cuda'; ") and record.getMessage().endswith(said)


def test_operators_pass_opcheck():
    inputs, state, start = case(32, 20)
    forward, backward = torch.ops.rwkv_miss.wkv7_chunk_cuda, torch.ops.rwkv_miss.wkv7_chunk_cuda_backward
    leaves = [x.clone().requires_grad_() for x in (*inputs, state)]
    # The gradients are products of others' roundings: what opcheck compares is itself alone.
    torch.library.opcheck(forward.default, (*leaves, start, True))
    y, last, states = forward(*inputs, state, start, True)
    torch.library.opcheck(backward.default, (*inputs, start, states, y, last))


def test_compiles_as_one_graph():
    inputs, state, start = case(32)
    weights = WKV7.make_weights(inputs, state)
    torch._dynamo.reset()
    compiled = torch.compile(on_cuda, fullgraph=True, backend="aot_eager")
    eager = run(on_cuda, inputs, state, start, weights)
    WKV7.assert_close(run(compiled, inputs, state, start, weights), eager, 1e-6)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (swapped_arguments, "y: error"),
        (swapped_sizes, "out of bounds"),
        (wrong_grid, "out of bounds"),
        (wrong_block, "__trap"),
    ],
)
def test_a_launch_that_is_wrong_is_noticed(change, found, session, change_launches):
    inputs, state, start = case(32)
    change_launches(change)
    with pytest.raises((AssertionError, driver.DriverError)) as error:
        assert_close_to_the_reference(inputs, state, start)
    assert found in "; ".join([str(error.value), *session.failures])
    session.failures.clear()


def test_memory_that_was_not_asked_for_is_refused(session, forgetful, monkeypatch):
    monkeypatch.setattr(driver, "_SHARED_UNASKED", 1 << 20)
    inputs, state, start = case()
    with pytest.raises(driver.DriverError, match="cuLaunchKernel: CUDA_ERROR_INVALID_VALUE"):
        run(on_cuda, inputs, state, start, WKV7.make_weights(inputs, state))
