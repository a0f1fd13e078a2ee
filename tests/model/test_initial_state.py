"""A learned initial state: every sequence begins from it, alone, in pieces and packed with others."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from rwkv_miss import load_model
from rwkv_miss.errors import UserError
from rwkv_miss.model.documents import run_from
from rwkv_miss.model.initial_state import add_initial_state, file_layout, is_state, load_initial_state, state_shapes
from tests.helpers import loss_sum

TOKENS = torch.randint(64, (3, 41), generator=torch.Generator().manual_seed(1))
# Documents of 1 to 41 tokens; the first row begins with the rest of an earlier document, the last has no start at all.
STARTS = ([5, 6, 7, 23], [0, 20, 40], [])


def seq_start() -> Tensor:
    starts = torch.zeros(TOKENS.shape, dtype=torch.bool)
    for row, places in enumerate(STARTS):
        starts[row, places] = True
    return starts


def learned(path, dtype=None, backend="auto", std=0.5):
    """A model with a random initial state."""
    model = load_model(path, dtype, wkv_backend=backend)
    add_initial_state(model)
    rng = torch.Generator().manual_seed(7)
    for name, p in model.named_parameters():
        if is_state(name):
            p.data.copy_(std * torch.randn(p.shape, generator=rng))
    return model


def one_by_one(model, state) -> Tensor:
    """The logits of each document in a call of its own."""
    rows = []
    for row, places in enumerate(STARTS):
        edges = sorted({0, *places, TOKENS.shape[1]})
        parts = []
        for start, end in pairwise(edges):
            carried = state.map(lambda x, row=row: x[:, row : row + 1]) if start == 0 and 0 not in places else None
            parts.append(model(TOKENS[row : row + 1, start:end], carried)[0])
        rows.append(torch.cat(parts, 1))
    return torch.cat(rows)


def gradients(model, logits: Tensor) -> dict[str, Tensor]:
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad((logits.double() * weights).sum(), parameters), strict=True))


def test_a_packed_row_is_its_documents_one_by_one(either_base):
    """Outputs, the last state and all gradients, also those through the initial state and the carried one."""
    model = learned(either_base, torch.float64)
    earlier = TOKENS.flip(0)[:, :4]
    packed, last = model(TOKENS, model(earlier)[1], seq_start())
    separate = one_by_one(model, model(earlier)[1])
    assert (packed - separate).abs().max() < 1e-11
    for row, places in enumerate(STARTS[:2]):
        _, alone = model(TOKENS[row : row + 1, places[-1] :])
        assert (last.wkv[:, row] - alone.wkv[:, 0]).abs().max() < 1e-11
    mine, exact = gradients(model, packed), gradients(model, separate)
    assert any(is_state(name) and g.abs().max() > 1e-3 for name, g in mine.items())
    for name, g in mine.items():
        assert (g - exact[name]).norm() <= 1e-9 * exact[name].norm(), name


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_the_kernels_agree_with_float64(either_base, backend):
    exact_model, model = learned(either_base, torch.float64), learned(either_base, torch.float32, backend)
    exact, logits = exact_model(TOKENS, None, seq_start())[0], model(TOKENS, None, seq_start())[0]
    assert (logits - exact).norm() < 1e-5 * exact.norm()
    mine, other = gradients(model, logits), gradients(exact_model, exact)
    for name, g in mine.items():
        assert (g - other[name]).norm() <= 1e-3 * other[name].norm(), name


def test_bf16_keeps_the_learned_state_in_fp32(either_base):
    exact_model, model = learned(either_base, torch.float32), learned(either_base, torch.bfloat16)
    assert {p.dtype for n, p in model.named_parameters() if is_state(n)} == {torch.float32}
    exact, logits = exact_model(TOKENS, None, seq_start())[0], model(TOKENS, None, seq_start())[0]
    assert logits.dtype == torch.bfloat16 and (logits - exact).norm() < 0.05 * exact.norm()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zeros_are_the_base_to_the_bit(either_base, dtype):
    base, model = load_model(either_base, dtype), learned(either_base, dtype, std=0.0)
    assert torch.equal(model(TOKENS)[0], base(TOKENS)[0])
    expected = base(TOKENS, None, seq_start())[0]
    assert (model(TOKENS, None, seq_start())[0] - expected).norm() <= (1e-5 if dtype == torch.float32 else 0.03) * (
        expected.norm()
    )


@torch.no_grad()
def test_a_learned_state_is_where_sequences_begin_and_nothing_else(either_base):
    model = learned(either_base, torch.float64)
    whole, last = model(TOKENS)
    assert not torch.allclose(whole, load_model(either_base, torch.float64)(TOKENS)[0])
    # In pieces: the second goes on from the first's state, not from the learned one.
    logits, state = model(TOKENS[:, :9])
    rest, end = model(TOKENS[:, 9:], state)
    assert (torch.cat([logits, rest], 1) - whole).abs().max() < 1e-11 and (end.wkv - last.wkv).abs().max() < 1e-11
    # Given as a state it is the same.
    zeros = model(TOKENS[:, :1])[1].map(torch.zeros_like)
    zeros.wkv[:] = torch.stack([model.get_parameter(key) for key in state_shapes(model.config)]).unsqueeze(1)
    assert torch.equal(load_model(either_base, torch.float64)(TOKENS, zeros)[0], whole)


@pytest.mark.parametrize("chunk_len", [pytest.param(1, marks=pytest.mark.slow), 7, 40])
def test_chunks_are_the_whole(either_base, chunk_len):
    model = learned(either_base, torch.float64)
    batch = {"tokens": TOKENS, "targets": TOKENS.flip(1), "seq_start": seq_start()}
    keys = list(state_shapes(model.config))
    found, expected = (
        torch.autograd.grad(loss_sum(model, batch, None, n)[0], [model.get_parameter(key) for key in keys])
        for n in (chunk_len, None)
    )
    for key, mine, whole in zip(keys, found, expected, strict=True):
        assert (mine - whole).norm() <= 1e-6 * whole.norm() > 0, key  # the loss itself is in fp32


def test_gradient_checkpointing_changes_no_gradient(either_base, recomputed_blocks):
    model = learned(either_base)
    expected = gradients(model, model(TOKENS, None, seq_start())[0])
    model.gradient_checkpointing = True
    mine = gradients(model, model(TOKENS, None, seq_start())[0])
    assert len(recomputed_blocks) == model.config.n_layer
    assert all(torch.equal(mine[name], expected[name]) for name in expected)


def test_the_padding_of_segments_is_less_than_half():
    """With one long and many short documents, the op runs over less than twice the positions of the batch."""
    sizes = []

    def op(inputs, state, seq_start):
        sizes.append(inputs[0].shape[0] * inputs[0].shape[1])
        return inputs[0], state

    starts = torch.zeros(2, 512, dtype=torch.bool)
    starts[0, 300:] = starts[1, ::7] = True
    x = torch.randn(2, 512, 2, 4)
    y, last = run_from(op, [x], [0.0], None, torch.ones(2, 4, 4), starts)
    assert torch.equal(y, x) and torch.equal(last, torch.ones(2, 2, 4, 4))
    assert 2 * 512 <= sum(sizes) < 2 * 2 * 512


# Files


def write_state(model, path) -> None:
    torch.save({k: file_layout(model.get_parameter(k).data, type(model)) for k in state_shapes(model.config)}, path)


@torch.no_grad()
def test_a_state_file_and_a_state_beside_the_weights(either_base, tmp_path):
    model = learned(either_base)
    expected, _ = model(TOKENS)
    path = tmp_path / "state.pth"
    write_state(model, path)
    loaded = load_model(either_base)
    load_initial_state(loaded, path)
    assert torch.equal(loaded(TOKENS)[0], expected)
    # Beside bf16 weights the fp32 state does not make the model fp32.
    weights = {k: t.bfloat16() for k, t in torch.load(either_base).items()}
    torch.save(weights | torch.load(path), tmp_path / "both.pth")
    both = load_model(tmp_path / "both.pth")
    assert {p.dtype for n, p in both.named_parameters() if not is_state(n)} == {torch.bfloat16}
    for key in state_shapes(model.config):
        assert torch.equal(both.get_parameter(key), model.get_parameter(key))
    with pytest.raises(UserError, match="learned initial state already"):
        load_initial_state(both, path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("blocks.1.att.time_state"), "blocks.1.att.time_state is missing; the model has 3 layers"),
        (lambda t: t.update({"blocks.3.att.time_state": torch.zeros(2, 16, 16)}), "blocks.3.att.time_state is not"),
        (lambda t: t.update({"emb.weight": torch.zeros(2)}), "emb.weight is not a part of the state of an RWKV-"),
        (
            lambda t: t.update({"blocks.2.att.time_state": torch.zeros(4, 16, 16)}),
            r"blocks.2.att.time_state has shape \(4, 16, 16\), expected \(2, 16, 16\)",
        ),
        (lambda t: t["blocks.0.att.time_state"].fill_(float("nan")), "blocks.0.att.time_state has values that are not"),
    ],
)
def test_a_state_file_that_does_not_fit(either_base, tmp_path, change, words):
    path = tmp_path / "state.pth"
    write_state(learned(either_base), path)
    tensors = torch.load(path)
    change(tensors)
    torch.save(tensors, path)
    with pytest.raises(UserError, match=rf"state\.pth: {words}"):
        load_initial_state(load_model(either_base), path)
    with pytest.raises(UserError, match=r"none\.pth: no such file \(state\)"):
        load_initial_state(load_model(either_base), tmp_path / "none.pth")


def test_a_state_of_other_layers_beside_the_weights(either_base, tmp_path):
    weights = torch.load(either_base) | {"blocks.1.att.time_state": torch.zeros(2, 16, 16)}
    torch.save(weights, tmp_path / "both.pth")
    with pytest.raises(UserError, match=r"blocks\.0\.att\.time_state is missing"):
        load_model(tmp_path / "both.pth")
