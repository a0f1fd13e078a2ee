"""A prompt that begins with a text that was read before is read from there on, and the member gets the same text."""

from __future__ import annotations

import pytest
import torch

from rwkv_miss import AdapterConfig, load_model
from rwkv_miss.data.tokenizers import END
from rwkv_miss.generation.engine import Engine, Piece
from rwkv_miss.generation.sampling import Sampling
from tests.generation.alone import check, load, save
from tests.generation.letters import LETTERS, ids_of, prompt_of

ASK = Sampling(max_tokens=5, logprobs=20)
PLENTY = 2**30


def read_tokens(model) -> list[int]:
    """Grows by the number of positions of each of the model's calls."""
    found: list[int] = []
    model.emb.register_forward_hook(lambda _, inputs, output: found.append(inputs[0].numel()))
    return found


def run(engine: Engine, prompt: list[int], sampling: Sampling = ASK, **options) -> tuple[int, list[Piece]]:
    return engine.add(prompt, sampling, **options), list(engine)


def cached(pieces: list[Piece]) -> int:
    assert len({piece.cached_tokens for piece in pieces}) == 1
    return pieces[-1].cached_tokens


@pytest.mark.parametrize("max_positions", [None, 7])
def test_what_was_read_before(either_base, max_positions):
    model, plain = load(either_base, torch.float64), load(either_base, torch.float64)
    positions = read_tokens(model)
    engine = Engine(model, LETTERS, max_positions, prefix_cache_bytes=PLENTY)
    first = prompt_of(20, 0)
    member, pieces = run(engine, first)
    check(plain, first, pieces, member, 2e-6)
    assert cached(pieces) == 0 and sum(positions) == 20 + 4
    said = ids_of(pieces, member)

    for prompt, known in (
        (first + prompt_of(3, 1), 20),  # goes on
        (first, 20),  # the same one
        (first + prompt_of(3, 1) + prompt_of(30, 2), 23),  # the longest of two
        (first + said[:-1], 20),  # no longer than a finished text, after which the logits are not known
        (first + said, 24),  # a finished text: its last token has not been read
        (first + said + prompt_of(4, 3), 25),  # the one before as a prompt
        (first[:19], 0),
        ([*first[:18], first[18] % 63 + 1], 0),
        (first[1:], 0),
    ):
        positions.clear()
        member, pieces = run(engine, prompt)
        check(plain, prompt, pieces, member, 2e-6)
        assert cached(pieces) == known and sum(positions) == len(prompt) - known + 4


def test_a_batch_of_prompts_known_and_unknown(either_base):
    plain = load(either_base, torch.float64)
    engine = Engine(load(either_base, torch.float64), LETTERS, 16, prefix_cache_bytes=PLENTY)
    run(engine, prompt_of(9, 0))
    prompts = [prompt_of(9, 0), prompt_of(5, 1), prompt_of(9, 0) + prompt_of(40, 2), prompt_of(9, 0), prompt_of(50, 3)]
    members = [engine.add(prompt, ASK) for prompt in prompts]
    pieces = list(engine)
    for member, prompt in zip(members, prompts, strict=True):
        check(plain, prompt, pieces, member, 2e-6)
    known = {piece.member: piece.cached_tokens for piece in pieces}
    assert [known[member] for member in members] == [9, 0, 9, 9, 0]


def test_states_are_those_of_an_adapter(either_base, tmp_path):
    configs = {"a": AdapterConfig(r=4), "b": AdapterConfig("miss+state", r=4), "c": AdapterConfig(r=4)}
    folders = {name: save(either_base, tmp_path / name, config, ord(name)) for name, config in configs.items()}
    models = {name: load(either_base, torch.float64, folder) for name, folder in folders.items()}
    models[None] = load(either_base, torch.float64)
    engine = Engine(load(either_base, torch.float64), LETTERS, prefix_cache_bytes=PLENTY)
    for name in "ab":
        engine.adapters.add(name, folders[name])
    for known in (0, 11):
        for name in (None, "a", "b"):
            member, pieces = run(engine, prompt_of(11, 0), adapter=name)
            check(models[name], prompt_of(11, 0), pieces, member, 2e-6)
            assert cached(pieces) == known
    engine.add([*prompt_of(11, 0), 1], ASK, adapter="a")  # begins from a kept state, and ends after the removal
    engine.adapters.remove("a")
    engine.adapters.add("a", folders["c"])
    pieces = list(engine)
    check(models["a"], [*prompt_of(11, 0), 1], pieces, pieces[0].member, 2e-6)
    for known in (0, 11):  # another adapter's name does not give it the states
        member, pieces = run(engine, prompt_of(11, 0), adapter="a")
        check(models["c"], prompt_of(11, 0), pieces, member, 2e-6)
        assert cached(pieces) == known
    before = engine._cache._bytes
    for name in ("a", "b"):
        engine.adapters.remove(name)
    assert {key[0] for key in engine._cache._kept} == {None} and 0 < engine._cache._bytes < before


def test_what_was_not_used_for_longest_goes_first(make_base):
    model = load(make_base(), torch.float64)

    def known(engine: Engine, *prompts: list[int]) -> list[int]:
        return [cached(run(engine, prompt, Sampling(max_tokens=1))[1]) for prompt in prompts]

    a, b, c, d = (prompt_of(10, seed) for seed in range(4))
    engine = Engine(model, LETTERS, prefix_cache_bytes=PLENTY)
    assert known(engine, a) == [0]
    size = engine._cache._bytes
    engine = Engine(model, LETTERS, prefix_cache_bytes=3 * size + 50)
    assert known(engine, a, b, [*a, 1], c) == [0, 0, 10, 0]  # a was used after b, which had to go
    assert known(engine, c, [*a, 2], b) == [10, 10, 0]
    assert known(engine, d, [*a, 2], c) == [0, 11, 0]
    assert 3 * size <= engine._cache._bytes <= 3 * size + 50
    for budget in (0, 100):
        engine = Engine(model, LETTERS, prefix_cache_bytes=budget)
        assert known(engine, a, a) == [0, 0]
        assert engine._cache._bytes == 0


def test_nothing_is_kept_of_texts_that_go_on_from_a_state_or_are_damaged(either_base):
    model = load(either_base, torch.float64)
    engine = Engine(model, LETTERS, prefix_cache_bytes=PLENTY)
    with torch.no_grad():
        _, state = model(torch.tensor([[5, 6, 7]]))
    damaged = load_model(either_base, torch.float64)
    damaged.head.weight.data[END] = torch.nan
    run(engine, prompt_of(10, 0), state=state)
    assert cached(run(engine, prompt_of(10, 0))[1]) == 0
    assert cached(run(engine, prompt_of(10, 0), state=state)[1]) == 0
    engine = Engine(damaged, LETTERS, prefix_cache_bytes=PLENTY)
    engine.add(prompt_of(10, 0))
    assert [piece.finish for piece in engine.step()] == ["not_finite"] and engine._cache._bytes == 0


def test_what_a_cancelled_member_had_read_is_kept(either_base):
    plain = load(either_base, torch.float64)
    engine = Engine(load(either_base, torch.float64), LETTERS, prefix_cache_bytes=PLENTY)
    member = engine.add(prompt_of(10, 0))
    ids = [token for _ in range(4) for piece in engine.step() for token in piece.ids]
    engine.cancel(member)
    assert list(engine)[-1].finish == "cancelled"
    prompt = prompt_of(10, 0) + ids + [3, 4]
    member, pieces = run(engine, prompt)
    assert cached(pieces) == 13
    check(plain, prompt, pieces, member, 2e-6)
