"""A sequence in chunks is the sequence as a whole; documents in one row are the documents alone; and what is held
for the backward pass meanwhile."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rwkv_miss.adapters.inject import inject
from rwkv_miss.config import AdapterConfig, ModelConfig
from rwkv_miss.model import MODELS
from rwkv_miss.model.loss import loss_sum
from rwkv_miss.model.rwkv import RWKV
from rwkv_miss.model.state import State
from tests.model.live_bytes import peak_bytes

LOW_RANK = {7: {"w": 5, "a": 6, "v": 3, "g": 9}, 6: {"maa": 5, "decay": 7}}
VERSIONS = [6, 7]
T = 37


def adapted(version: int, dtype: torch.dtype = torch.float64, backend: str = "torch", dropout: float = 0.0) -> RWKV:
    """3 layers of 2 heads of 16, every weight and every adapter random."""
    config = ModelConfig(version, 3, 32, 2, 16, 64, 50, LOW_RANK[version])
    model = MODELS[version](config, backend)
    generator = torch.Generator().manual_seed(version)

    def randomise(weight: Tensor, mean: float, std: float) -> None:
        weight.data = (mean + std * torch.randn(weight.shape, generator=generator)).to(dtype)

    for name, weight in model.named_parameters():
        if weight.dim() == 1:
            randomise(weight, float(name.endswith("weight")), 0.2)  # norms
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
    """A state that is not zero, and that gradients are wanted of."""
    dtype = model.emb.weight.dtype
    zeros = vars(State.zeros(model.config, rows, dtype, "cpu"))
    generator = torch.Generator().manual_seed(5)
    drawn = {name: 0.5 * torch.randn(x.shape, generator=generator).to(x.dtype) for name, x in zeros.items()}
    return State(**{name: x.requires_grad_() for name, x in drawn.items()})


def outcome(model: RWKV, loss: Tensor, before: State, after: State) -> dict[str, Tensor]:
    """The loss, the last state, and the gradients of the adapters and the first state. What is differentiated has
    the last state in it too."""
    weights = trained(model)
    generator = torch.Generator().manual_seed(6)
    total = loss
    for x in vars(after).values():
        total = total + (x * torch.randn(x.shape, generator=generator).to(x.dtype)).sum()
    gradients = torch.autograd.grad(total, [*weights.values(), *vars(before).values()])
    return {
        "loss": loss.detach(),
        **{f"last {name}": x.detach() for name, x in vars(after).items()},
        **dict(zip([*weights, *(f"first {name}" for name in vars(before))], gradients, strict=True)),
    }


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """In norm, of each tensor's own."""
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        assert x.norm() > 0, f"{name}: zeros show nothing"
        error = ((found[name] - x).norm() / x.norm()).item()
        assert error <= tolerance, f"{name}: relative error {error:.1e}"


BACKENDS = [("torch", torch.float64, 1e-12), ("torch", torch.float32, 3e-6), ("cpu", torch.float32, 3e-6)]


@pytest.mark.parametrize("chunk_len", [1, 5, 16, 36])
@pytest.mark.parametrize(("backend", "dtype", "tolerance"), BACKENDS)
@pytest.mark.parametrize("version", VERSIONS)
def test_chunks_are_the_whole(version, backend, dtype, tolerance, chunk_len):
    model, batch = adapted(version, dtype, backend), packed_batch()

    def run(chunk_len: int | None) -> dict[str, Tensor]:
        before = first_state(model)
        loss, after = loss_sum(model, batch, before, chunk_len)
        assert loss.dtype == dtype
        return outcome(model, loss, before, after)

    assert_close(run(chunk_len), run(None), tolerance)


@pytest.mark.parametrize("version", VERSIONS)
def test_chunks_of_a_fresh_state_and_of_padding(version):
    """As training begins; and a row whose last chunks hold no target."""
    model, batch = adapted(version), packed_batch()
    batch["targets"][:, 12:] = -100

    def run(chunk_len: int | None) -> dict[str, Tensor]:
        loss, _ = loss_sum(model, batch, None, chunk_len)
        weights = trained(model)
        return {"loss": loss.detach()} | dict(
            zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True)
        )

    assert_close(run(5), run(None), 1e-12)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_detached_state_cuts_the_gradient_and_not_the_value(version):
    """Segments of 2 chunks of 5, as truncated backpropagation takes them: each has the loss and the gradients of the
    segment run from the true state held constant, which are not those of the whole."""
    model, batch = adapted(version), packed_batch()
    weights = trained(model)

    def gradients(loss: Tensor) -> dict[str, Tensor]:
        return dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))

    whole = loss_sum(model, batch)[0]
    exact = gradients(whole)
    state, total, found, expected = None, 0.0, {}, {}
    for start in range(0, T, 10):
        segment = {name: x[:, start : start + 10] for name, x in batch.items()}
        loss, after = loss_sum(model, segment, state, chunk_len=5)
        total += loss.item()
        for name, g in gradients(loss).items():
            found[name] = found.get(name, 0) + g
        with torch.no_grad():
            true = loss_sum(model, {name: x[:, :start] for name, x in batch.items()})[1] if start else None
        for name, g in gradients(loss_sum(model, segment, true)[0]).items():
            expected[name] = expected.get(name, 0) + g
        state = after.detach()
        assert not any(x.requires_grad for x in vars(state).values())
    assert total == pytest.approx(whole.item(), rel=1e-12)
    assert_close(found, expected, 1e-12)
    for name in exact:
        # The last layer's channel mix reaches no later column but through the shift, so its share is the smallest.
        assert (found[name] - exact[name]).norm() > 1e-4 * exact[name].norm(), name


@pytest.mark.parametrize("version", VERSIONS)
def test_dropout_is_the_same_when_a_chunk_or_a_block_is_computed_again(version):
    """The state that dropout is drawn from is put back: the gradients are those of the run that keeps everything."""
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
    assert_close(run(chunked), expected, 1e-12)
    model.gradient_checkpointing = True
    assert_close(run(plain), expected, 1e-12)
    assert_close(run(chunked), expected, 1e-12)
    torch.manual_seed(4)
    other = outcome(model, *chunked())
    assert (other["loss"] - expected["loss"]).abs() > 1e-3


@pytest.mark.parametrize("version", VERSIONS)
def test_gradient_checkpointing_carries_v_first_and_the_states(version):
    """Equal to the bit, from a state, in packed rows; and much less is held."""
    model, batch = adapted(version, torch.float32, "cpu"), packed_batch(length=T)
    found, peaks = [], []

    def run() -> None:
        before = first_state(model)
        loss, after = loss_sum(model, batch, before)
        found.append(outcome(model, loss, before, after))

    for model.gradient_checkpointing in (False, True):
        peaks.append(peak_bytes(run))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert peaks[1] < peaks[0] / 2


def step(model: RWKV, length: int, chunk_len: int | None = None, bptt_chunks: int = 0) -> Callable[[], None]:
    """A training step on one row of `length` columns: forward and backward, in segments where gradients are cut."""
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


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("version", VERSIONS)
def test_memory_is_flat_where_gradients_are_cut(version, checkpointing):
    model = adapted(version, torch.float32, "cpu")
    model.gradient_checkpointing = checkpointing
    short, long = (peak_bytes(step(model, length, chunk_len=16, bptt_chunks=2)) for length in (64, 1024))
    tokens = 3 * 8 * (1024 - 64)  # the batch itself is not counted; what is made of it may be
    assert short <= long <= short + tokens


@pytest.mark.parametrize("version", VERSIONS)
def test_exact_chunks_hold_states_and_not_activations(version):
    model = adapted(version, torch.float32, "cpu")
    state = sum(x.nbytes for x in vars(State.zeros(model.config, 1, torch.float32, "cpu")).values())
    whole = [peak_bytes(step(model, length)) for length in (256, 1024)]
    exact = [peak_bytes(step(model, length, chunk_len=32)) for length in (256, 1024)]
    more = (1024 - 256) // 32
    assert whole[1] > 3.5 * whole[0]
    # Of each chunk: the state, its layers before they are stacked, and as views of them.
    assert exact[1] - exact[0] <= more * 3 * state
    assert exact[1] < whole[1] / 5
