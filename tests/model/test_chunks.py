"""Chunks give the results of the whole sequence, documents packed into a row those of each document alone; and how
much memory is held for the backward pass."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rwkv_miss.adapters.inject import inject
from rwkv_miss.config import AdapterConfig, ModelConfig
from rwkv_miss.model.base import RWKV
from rwkv_miss.model.state import State
from rwkv_miss.model.versions import MODELS
from tests.helpers import loss_sum
from tests.model.live_bytes import peak_bytes

LOW_RANK = {7: {"w": 5, "a": 6, "v": 3, "g": 9}, 6: {"maa": 5, "decay": 7}}
VERSIONS = [6, 7]
T = 37


def adapted(
    version: int,
    dtype: torch.dtype = torch.float64,
    backend: str = "torch",
    dropout: float = 0.0,
    n_head: int = 2,
    head_size: int = 16,
) -> RWKV:
    """3 layers, every weight and every adapter random."""
    config = ModelConfig(version, 3, n_head * head_size, n_head, head_size, 64, 50, LOW_RANK[version])
    model = MODELS[version](config, backend)
    generator = torch.Generator().manual_seed(version)

    def randomise(weight: Tensor, mean: float, std: float) -> None:
        weight.data = (mean + std * torch.randn(weight.shape, generator=generator)).to(dtype)

    for name, weight in model.named_parameters():
        if weight.dim() == 1:
            randomise(weight, float(name.endswith("weight")), 0.2)  # norms
        elif name.endswith(("time_decay", "w0")):
            randomise(weight, -3.0, 1.0)  # a step keeps 0.95 of the state or so, as in a trained model
        elif 1 in weight.shape[:2]:
            randomise(weight, 0.5, 0.3)  # vectors
        else:
            randomise(weight, 0.0, 1.0 if name == "emb.weight" else 32**-0.5)
    inject(model, AdapterConfig(r=4, dropout=dropout))
    for weight in trained(model).values():
        randomise(weight, 0.0, 0.1)
    return model


def trained(model: RWKV) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def packed_batch(rows: int = 2, length: int = T) -> dict[str, Tensor]:
    """Row 0 is one document and padding, row 1 three documents; a third of the targets carry no loss."""
    generator = torch.Generator().manual_seed(0)
    tokens, targets = torch.randint(50, (2, rows, length), generator=generator)
    targets[torch.rand(rows, length, generator=generator) < 0.3] = -100
    seq_start = torch.zeros(rows, length, dtype=torch.bool)
    if rows == 2:
        targets[0, 30:], seq_start[0, 30], seq_start[1, [9, 23]] = -100, True, True
    return {"tokens": tokens, "targets": targets, "seq_start": seq_start}


def first_state(model: RWKV, rows: int = 2) -> State:
    """A random state that requires gradients."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        _, state = model(torch.zeros(rows, 1, dtype=torch.int64))
    state = state.map(lambda x: 0.5 * torch.randn(x.shape, generator=generator).to(x.dtype))
    return state.map(Tensor.requires_grad_)


def tensors(state: State) -> dict[str, Tensor]:
    return {name: x for name, x in vars(state).items() if isinstance(x, Tensor)}


def outcome(model: RWKV, loss: Tensor, before: State, after: State) -> dict[str, Tensor]:
    """The loss, the last state, and the gradients of the adapters and the first state. The last state is part of what
    is differentiated."""
    weights = trained(model)
    generator = torch.Generator().manual_seed(6)
    total = loss
    for x in tensors(after).values():
        total = total + (x * torch.randn(x.shape, generator=generator).to(x.dtype)).sum()
    gradients = torch.autograd.grad(total, [*weights.values(), *tensors(before).values()])
    return {
        "loss": loss.detach(),
        **{f"last {name}": x.detach() for name, x in tensors(after).items()},
        **dict(zip([*weights, *(f"first {name}" for name in tensors(before))], gradients, strict=True)),
    }


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-12) -> None:
    """Compares by relative errors in norm: the loss, and all together, to `tolerance`; each tensor to ten times that.

    In fp32 single gradients are less exact, in chunks as in whole rows (up to 1e-5 from float64): the group norm after
    the recurrence makes the receptance's gradient a small difference of large sums.
    """
    assert found.keys() == expected.keys()
    errors = {name: (found[name] - x).norm().item() for name, x in expected.items()}
    norms = {name: x.norm().item() for name, x in expected.items()}
    for name in expected:
        assert norms[name] > 0, f"{name}: zeros show nothing"
        allowed = tolerance if name == "loss" else 10 * tolerance
        assert errors[name] <= allowed * norms[name], f"{name}: relative error {errors[name] / norms[name]:.1e}"
    error = math.hypot(*errors.values()) / math.hypot(*norms.values())
    assert error <= tolerance, f"relative error {error:.1e}"


BACKENDS = [
    ("torch", torch.float64, 1e-12),
    ("torch", torch.float32, 2e-6),
    ("cpu", torch.float32, 1e-6),
    ("reference", torch.float32, 1e-6),
]


@pytest.mark.parametrize("chunk_len", [pytest.param(1, marks=pytest.mark.slow), 5, 16, 36])
@pytest.mark.parametrize(("backend", "dtype", "tolerance"), BACKENDS[:3])
@pytest.mark.parametrize("version", VERSIONS)
def test_chunks_are_the_whole(version, backend, dtype, tolerance, chunk_len):
    model, batch = adapted(version, dtype, backend), packed_batch()

    def run(chunk_len: int | None) -> dict[str, Tensor]:
        before = first_state(model)
        loss, after = loss_sum(model, batch, before, chunk_len)
        assert loss.dtype == dtype
        return outcome(model, loss, before, after)

    assert_close(run(chunk_len), run(None), tolerance)


@pytest.mark.parametrize(("backend", "dtype", "tolerance"), BACKENDS)
@pytest.mark.parametrize("version", VERSIONS)
def test_a_document_in_a_packed_row_is_the_document_alone(version, backend, dtype, tolerance):
    """The loss of each document and its gradients with respect to the adapters and to its embeddings; the embeddings of
    the other documents get none."""
    model, batch = adapted(version, dtype, backend), packed_batch()
    inputs: list[Tensor] = []

    def keep(module: torch.nn.Module, args: tuple, output: Tensor) -> Tensor:
        inputs.append(output.detach().requires_grad_())
        return inputs[-1]

    model.emb.register_forward_hook(keep)

    def run(batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        loss, _ = loss_sum(model, batch)
        weights = trained(model)
        *gradients, of_input = torch.autograd.grad(loss, [*weights.values(), inputs[-1]])
        return {"loss": loss.detach()} | dict(zip(weights, gradients, strict=True)), of_input

    for row, start, stop in ((0, 0, 30), (1, 0, 9), (1, 9, 23), (1, 23, T)):
        of_document = torch.zeros(2, T, dtype=torch.bool)
        of_document[row, start:stop] = True
        packed, of_inputs = run(batch | {"targets": batch["targets"].where(of_document, -100)})
        assert not of_inputs[~of_document].any()
        alone, of_input = run({name: x[row : row + 1, start:stop] for name, x in batch.items()})
        found = packed | {"input": of_inputs[of_document]}
        assert_close(found, alone | {"input": of_input[0]}, tolerance)


@pytest.mark.parametrize("version", VERSIONS)
def test_chunks_of_a_fresh_state_and_of_padding(version):
    """Without a state, as training begins; the last chunks of the rows hold no target."""
    model, batch = adapted(version), packed_batch()
    batch["targets"][:, 12:] = -100

    def run(chunk_len: int | None) -> dict[str, Tensor]:
        loss, _ = loss_sum(model, batch, None, chunk_len)
        weights = trained(model)
        return {"loss": loss.detach()} | dict(
            zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True)
        )

    assert_close(run(5), run(None))


@pytest.mark.parametrize("version", VERSIONS)
def test_a_detached_state_cuts_the_gradient_and_not_the_value(version):
    """Truncated backpropagation in segments of 2 chunks of 5: each segment has the loss and the gradients of its window
    run from the exact state held constant, and these gradients are not those of the whole."""
    model, batch = adapted(version), packed_batch()
    weights = trained(model)

    def gradients(loss: Tensor) -> dict[str, Tensor]:
        return dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))

    whole = loss_sum(model, batch)[0]
    exact = gradients(whole)
    state, total, found, expected = None, 0.0, {}, {}
    for start in range(0, T, 10):
        window = {name: x[:, start : start + 10] for name, x in batch.items()}
        loss, after = loss_sum(model, window, state, chunk_len=5)
        total += loss.item()
        for name, g in gradients(loss).items():
            found[name] = found.get(name, 0) + g
        with torch.no_grad():
            true = loss_sum(model, {name: x[:, :start] for name, x in batch.items()})[1] if start else None
        for name, g in gradients(loss_sum(model, window, true)[0]).items():
            expected[name] = expected.get(name, 0) + g
        state = after.detach()
        assert not any(x.requires_grad for x in tensors(state).values())
    assert total == pytest.approx(whole.item(), rel=1e-12)
    assert_close(found, expected)
    for name in exact:
        if not name.startswith("blocks.2."):  # some adapters of the last layer affect no later column
            assert (found[name] - exact[name]).norm() > 1e-4 * exact[name].norm(), name


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
def test_dropout_is_the_same_when_a_chunk_or_a_block_is_computed_again(version):
    """The random state is restored for recomputation: the gradients are those of a run that stores everything."""
    batch = packed_batch()
    model = adapted(version, dropout=0.5).train()
    kept = first_state(model)

    def run(chunks: Callable[[], tuple[Tensor, State]]) -> dict[str, Tensor]:
        torch.manual_seed(3)
        return outcome(model, *chunks())

    def plain() -> tuple[Tensor, State, State]:
        state, total = kept, 0.0
        for start in range(0, T, 8):
            loss, state = loss_sum(model, {name: x[:, start : start + 8] for name, x in batch.items()}, state)
            total = total + loss
        return total, kept, state

    def chunked() -> tuple[Tensor, State, State]:
        loss, after = loss_sum(model, batch, kept, chunk_len=8)
        return loss, kept, after

    expected = run(plain)
    assert_close(run(chunked), expected)
    model.gradient_checkpointing = True
    assert_close(run(plain), expected)
    assert_close(run(chunked), expected)
    torch.manual_seed(4)
    other = outcome(model, *chunked())
    assert (other["loss"] - expected["loss"]).abs() > 1e-3


@pytest.mark.parametrize("version", VERSIONS)
def test_gradient_checkpointing_carries_v_first_and_the_states(version):
    """From a state, in packed rows, results are equal to the bit; and much less memory is held."""
    model, batch = adapted(version, torch.float32, "cpu"), packed_batch(length=128)
    found, peaks = [], []

    def run() -> None:
        before = first_state(model)
        loss, after = loss_sum(model, batch, before)
        found.append(outcome(model, loss, before, after))

    for model.gradient_checkpointing in (False, True):
        peaks.append(peak_bytes(run))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert peaks[1] < peaks[0] / 2


@pytest.mark.parametrize("version", VERSIONS)
def test_a_layer_to_be_computed_again_keeps_its_input_alone(version):
    """What a layer hands on as state is no view of its normalised inputs, which would then live to the last layer."""
    low_rank = LOW_RANK[version]
    models = [MODELS[version](ModelConfig(version, n, 32, 2, 16, 64, 50, low_rank), "torch") for n in (4, 8)]
    batch = packed_batch(length=64)

    def forward(model: RWKV) -> None:
        model.gradient_checkpointing = True
        model(batch["tokens"], None, batch["seq_start"])

    few, many = (peak_bytes(lambda model=model: forward(model)) for model in models)
    inputs, states = 2 * 64 * 32 * 4, 2 * (2 * 32 + 2 * 16 * 16) * 4
    assert many - few < 4 * (1.5 * inputs + 3 * states)


def test_counts_what_is_alive():
    x = torch.ones(1000, requires_grad=True)

    def keeps():
        y = x * 2.0  # neither product saves it for the backward pass, but this variable holds it
        return (y * 3.0).sum()

    assert peak_bytes(keeps) == 4 * 2000 + 4
    assert peak_bytes(lambda: [x.detach() + 1 for _ in range(5)]) == 4 * 5000
    assert peak_bytes(lambda: [(x.detach() + 1).sum().item() for _ in range(5)]) <= 4 * 1000 + 8
    assert peak_bytes(lambda: x.detach()[:10].add_(1)) == 0


def step(model: RWKV, length: int, chunk_len: int | None = None, bptt_chunks: int = 0) -> Callable[[], None]:
    """A training step on one row of `length` columns: forward and backward, in windows where gradients are cut."""
    batch = packed_batch(1, length)

    def run() -> None:
        state = None
        size = chunk_len * bptt_chunks if bptt_chunks else length
        for start in range(0, length, size):
            loss, state = loss_sum(
                model, {name: x[:, start : start + size] for name, x in batch.items()}, state, chunk_len
            )
            loss.backward()
            state = state.detach()
        model.zero_grad()

    return run


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("version", VERSIONS)
def test_memory_is_flat_where_gradients_are_cut(version, checkpointing):
    model = adapted(version, torch.float32, "cpu")
    model.gradient_checkpointing = checkpointing
    short, long = (peak_bytes(step(model, length, chunk_len=8, bptt_chunks=2)) for length in (32, 160))
    assert short == long


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
def test_exact_chunks_hold_states_and_not_activations(version):
    model = adapted(version, torch.float32, "cpu")
    state = sum(x.nbytes for x in tensors(first_state(model, rows=1)).values())
    whole = [peak_bytes(step(model, length)) for length in (64, 256)]
    exact = [peak_bytes(step(model, length, chunk_len=16)) for length in (64, 256)]
    more = (256 - 64) // 16
    assert whole[1] > 3.5 * whole[0]
    # Of each chunk: the state, its layers before they are stacked, and as views of them.
    assert exact[1] - exact[0] <= more * 3 * state
    assert exact[1] < whole[1] / 5
