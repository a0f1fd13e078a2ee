"""State as a value: saved, loaded, moved, cut off from the gradient, and refused where it does not fit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from rwkv_miss import load_model
from rwkv_miss.errors import UserError
from rwkv_miss.model.state import State

TOKENS = torch.randint(64, (2, 23), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def model(either_base):
    return load_model(either_base)


def parts(state: State) -> list[torch.Tensor]:
    return [state.att_shift, state.wkv, state.ffn_shift]


@torch.no_grad()
def test_a_saved_state_goes_on_as_the_one_in_memory(model, tmp_path):
    _, state = model(TOKENS[:, :9])
    state.save(tmp_path / "state.safetensors")
    loaded = State.load(tmp_path / "state.safetensors")
    assert loaded.version == model.config.version and all(map(torch.equal, parts(loaded), parts(state)))
    assert torch.equal(model(TOKENS[:, 9:], loaded)[0], model(TOKENS[:, 9:], state)[0])
    assert not torch.equal(model(TOKENS[:, 9:])[0], model(TOKENS[:, 9:], state)[0])


def test_a_state_of_pieces_and_of_some_sequences_is_saved(model, tmp_path):
    """What is saved are views that require gradients."""
    _, state = model(TOKENS[:, :9])
    state.map(lambda x: x[:, 1:]).save(tmp_path / "state.safetensors")
    with torch.no_grad():
        logits, _ = model(TOKENS[1:, 9:], State.load(tmp_path / "state.safetensors"))
        assert torch.equal(logits, model(TOKENS[1:, 9:], state.map(lambda x: x[:, 1:].contiguous()))[0])


def test_detach_cuts_the_gradient_and_shares_the_values(model):
    _, state = model(TOKENS[:, :9])
    assert all(x.requires_grad for x in parts(state))
    cut = state.detach()
    assert not any(x.requires_grad for x in parts(cut)) and all(map(torch.equal, parts(cut), parts(state)))


@torch.no_grad()
def test_to_moves_and_casts(model):
    _, state = model(TOKENS[:, :9])
    half, double = state.to(dtype=torch.bfloat16), state.to("cpu", torch.float64)
    assert [x.dtype for x in parts(half)] == [torch.bfloat16, torch.float32, torch.bfloat16]
    assert [x.dtype for x in parts(double)] == [torch.float64] * 3
    assert {x.device.type for x in parts(state.to("meta"))} == {"meta"}
    model.to(torch.bfloat16)(TOKENS[:, 9:], half)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: replace(s, version=13 - s.version), ["the state is of RWKV-", "the model is an RWKV-"]),
        (lambda s: s.map(lambda x: x[:2]), ["state.att_shift is (2, 2, 32)", "(3, 2, 32)"]),
        (lambda s: s.map(lambda x: x[:, :1]), ["state.att_shift is (3, 1, 32)", "(3, 2, 32)"]),
        (lambda s: replace(s, wkv=s.wkv[..., :8]), ["state.wkv is (3, 2, 2, 16, 8)", "(3, 2, 2, 16, 16)"]),
        (lambda s: replace(s, ffn_shift=s.ffn_shift[..., 1:]), ["state.ffn_shift is (3, 2, 31)"]),
        (lambda s: s.to(dtype=torch.bfloat16), ["state.att_shift", "bfloat16", "float32", "state.to"]),
        (lambda s: s.to("meta"), ["state.att_shift", "on meta", "on cpu"]),
    ],
)
def test_a_state_that_does_not_fit_is_refused(model, change, words):
    _, state = model(TOKENS)
    with pytest.raises(UserError) as error:
        model(TOKENS, change(state))
    assert all(word in str(error.value) for word in words), error.value


def test_files_that_are_no_state(model, tmp_path):
    path = tmp_path / "state.safetensors"
    with pytest.raises(UserError, match=r"state\.safetensors: no such file"):
        State.load(path)
    model(TOKENS)[1].save(path)
    whole = path.read_bytes()
    for length in (0, 7, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match="is it truncated"):
            State.load(path)
    path.write_bytes(whole)
    tensors = load_file(path)
    save_file(tensors, path)
    with pytest.raises(UserError, match=r"RWKV version unknown; expected a state that State.save wrote"):
        State.load(path)
    del tensors["wkv"]
    save_file(tensors, path, {"rwkv_version": "7"})
    with pytest.raises(UserError, match="holds att_shift, ffn_shift of RWKV version 7"):
        State.load(path)


def test_a_full_disk_keeps_the_old_state(model, tmp_path, full_disk):
    path = tmp_path / "state.safetensors"
    model(TOKENS)[1].save(path)
    before = path.read_bytes()
    with full_disk(1000), pytest.raises(UserError, match="cannot be written"):
        model(TOKENS[:, :3])[1].save(path)
    assert path.read_bytes() == before and list(tmp_path.glob(".*")) == []
