"""The engine: sequences (members) join and leave a running batch, and each gets the text that it gets alone."""

from __future__ import annotations

import pytest
import torch

from rwkv_miss import load_model
from rwkv_miss.data.tokenizers import END, load_tokenizer
from rwkv_miss.errors import RunError, UserError
from rwkv_miss.generation.engine import Engine, Piece
from rwkv_miss.generation.sampling import Sampling
from rwkv_miss.model.base import RWKV
from rwkv_miss.model.initial_state import add_initial_state
from rwkv_miss.model.state import State
from tests.generation.letters import LETTERS, letters, prompt_of, text_of
from tests.scripted import Scripted

BYTES = load_tokenizer("bytes")


@torch.no_grad()
def greedy(model: RWKV, prompt: list[int], n_tokens: int) -> str:
    """Greedy decoding without a state: the whole sequence is run again for each token."""
    ids = list(prompt)
    while len(ids) < len(prompt) + n_tokens:
        ids.append(int(model(torch.tensor([ids]))[0][0, -1].argmax()))
        if ids[-1] == END:
            break
    return letters(ids[len(prompt) :])


def alone(model: RWKV, prompt: list[int], sampling: Sampling, **options) -> list[Piece]:
    engine = Engine(model, LETTERS)
    engine.add(prompt, sampling, **options)
    return list(engine)


@pytest.fixture
def model(either_base) -> RWKV:
    """In float64, so that the batch size makes no difference; greedily it never chooses the end token."""
    model = load_model(either_base, torch.float64)
    model.head.weight.data[END] = 0  # END has logit 0, and one of the 63 others is above 0
    return model


# Members come and go


@pytest.mark.parametrize("max_positions", [None, 7])
def test_members_that_come_and_go_get_the_texts_that_they_get_alone(either_base, max_positions):
    model = load_model(either_base, "fp32")
    model.head.weight.data[END] *= 2  # so that some texts end by themselves
    # (step at which the member is added, number of prompt tokens, max_tokens)
    plan = [(0, 3, 9), (0, 1, 4), (0, 12, 30), (2, 5, 1), (2, 40, 6), (5, 2, 20), (11, 8, 3), (11, 9, 12), (70, 4, 5)]
    engine = Engine(model, LETTERS, max_positions)
    pieces: list[Piece] = []
    to_come = list(enumerate(plan))
    step = 0
    while engine or to_come:
        while to_come and plan[to_come[0][0]][0] <= step:
            i, (_, length, max_tokens) = to_come.pop(0)
            assert engine.add(prompt_of(length, i), Sampling(max_tokens=max_tokens)) == i
        pieces += engine.step()
        step += 1
    for i, (_, length, max_tokens) in enumerate(plan):
        assert text_of(pieces, i) == greedy(model, prompt_of(length, i), max_tokens), f"member {i}"
        last = [piece for piece in pieces if piece.member == i][-1]
        ids = [token for piece in pieces if piece.member == i for token in piece.ids]
        assert last.finish == ("end" if ids[-1] == END else "max_tokens")
        assert sum(piece.finish is not None for piece in pieces if piece.member == i) == 1
    assert {piece.finish for piece in pieces} == {None, "end", "max_tokens"}


def test_members_are_added_in_the_loop_over_the_pieces(model):
    engine = Engine(model, LETTERS)
    engine.add(prompt_of(3, 0), Sampling(max_tokens=4))
    texts: dict[int, str] = {}
    for piece in engine:
        texts[piece.member] = texts.get(piece.member, "") + piece.text
        if piece.finish and piece.member < 3:
            assert engine.add(prompt_of(4, piece.member + 1), Sampling(max_tokens=4)) == piece.member + 1
    assert texts == {i: greedy(model, prompt_of(3 if i == 0 else 4, i), 4) for i in range(4)}
    assert len(engine) == 0 and list(engine) == [] and engine.step() == []


def test_a_loop_that_is_left_loses_nothing(model):
    engine = Engine(model, LETTERS)
    for i in range(3):
        engine.add(prompt_of(3, i), Sampling(max_tokens=4))
    pieces = []
    for _ in range(12):
        for piece in engine:
            pieces.append(piece)
            break
    assert [text_of(pieces, i) for i in range(3)] == [greedy(model, prompt_of(3, i), 4) for i in range(3)]
    assert list(engine) == []


def test_a_batch_does_not_compute_members_that_have_ended(model):
    shapes = []
    model.emb.register_forward_hook(lambda _, inputs, output: shapes.append(tuple(inputs[0].shape)))
    engine = Engine(model, LETTERS)
    lengths = [4, 1, 2, 6]
    for i, n in enumerate(lengths):
        engine.add(prompt_of(3, 10 + i), Sampling(max_tokens=n))
    assert len(list(engine)) == sum(lengths)
    assert shapes == [(4, 3), (3, 1), (2, 1), (2, 1), (1, 1), (1, 1)]


def test_a_cancelled_member_leaves_and_the_others_stay(model):
    engine = Engine(model, LETTERS, max_positions=8)
    kept, running = (engine.add(prompt_of(3, i), Sampling(max_tokens=12)) for i in (1, 2))
    pieces = [piece for _ in range(3) for piece in engine.step()]
    reading = engine.add(prompt_of(50, 3), keep_state=True)
    pieces += engine.step()
    waiting = engine.add(prompt_of(2, 4))
    for member in (running, reading, waiting):
        engine.cancel(member)
    pieces += engine.step()
    assert len(engine) == 1
    cancelled = {piece.member: piece for piece in pieces if piece.finish == "cancelled"}
    assert sorted(cancelled) == [running, reading, waiting] and not any(p.ids or p.state for p in cancelled.values())
    assert text_of(pieces, reading) == text_of(pieces, waiting) == ""
    assert text_of(pieces, running) == greedy(model, prompt_of(3, 2), 4)
    pieces += engine
    assert text_of(pieces, kept) == greedy(model, prompt_of(3, 1), 12)
    assert {piece.member for piece in pieces} == {0, 1, 2, 3}
    engine.cancel(kept)
    engine.cancel(99)
    assert engine.step() == []


def test_a_cancelled_member_leaves_its_state_and_the_text_held_back():
    engine = Engine(Scripted(b"yes\n\nUse", b"\xe4\xbd"), BYTES)
    for _ in range(2):
        engine.add("q", Sampling(stop=("\n\nUser:",)), keep_state=True)
    pieces = [piece for _ in range(7) for piece in engine.step()]
    engine.cancel(0)
    pieces += engine.step()
    assert text_of(pieces, 0) == "yes\n\nUs"
    assert pieces[-2].finish == "cancelled" and pieces[-2].state.att_shift.flatten().tolist() == [0, 6]


# Prompts


@pytest.mark.parametrize("max_positions", [3, 16, 100])
def test_prompts_of_very_different_lengths(model, max_positions):
    lengths = [1, 70, 2, 150, 16, 17, 3, 1]
    positions = []
    model.emb.register_forward_hook(lambda _, inputs, output: positions.append(inputs[0].numel()))
    engine = Engine(model, LETTERS, max_positions)
    for i, n in enumerate(lengths):
        engine.add(prompt_of(n, i), Sampling(max_tokens=5))
    pieces = list(engine)
    assert max(positions) <= max(max_positions, len(lengths))  # one token for each member is always allowed
    for i, n in enumerate(lengths):
        assert text_of(pieces, i) == greedy(model, prompt_of(n, i), 5), n


@pytest.mark.parametrize("learned", [False, True])
@torch.no_grad()
def test_a_prompt_in_pieces_leaves_the_state_of_the_whole(model, learned):
    """Beside it other prompts are read, from nothing and from a state."""
    if learned:
        add_initial_state(model)
        for block in model.blocks:
            torch.nn.init.normal_(block.att.time_state)
    _, begun = model(torch.tensor([prompt_of(9, 50)]))
    engine = Engine(model, LETTERS, max_positions=10)
    lengths = [33, 2, 25, 40, 11, 4]
    for i, n in enumerate(lengths):
        state = begun if i in (2, 4) else None
        engine.add(prompt_of(n, i), Sampling(max_tokens=1), state=state, keep_state=True)
    states = {piece.member: piece.state for piece in engine}
    for i, n in enumerate(lengths):
        before = prompt_of(9, 50) if i in (2, 4) else []
        _, whole = model(torch.tensor([before + prompt_of(n, i)]))
        for name in ("att_shift", "wkv", "ffn_shift"):
            torch.testing.assert_close(getattr(states[i], name), getattr(whole, name), rtol=1e-9, atol=1e-11)


def test_a_long_prompt_keeps_no_one_waiting(model):
    engine = Engine(model, LETTERS, max_positions=4)
    engine.add(prompt_of(3, 0), Sampling(max_tokens=100))
    engine.step()
    engine.add(prompt_of(400, 1), Sampling(max_tokens=1))
    engine.add(prompt_of(4, 2), Sampling(max_tokens=1))
    pieces = engine.step()
    assert [piece.member for piece in pieces] == [0, 2]
    for _ in range(20):
        assert [piece.member for piece in engine.step()] == [0]


# Samples


def test_the_settings_and_random_numbers_of_a_member_are_its_own(model):
    options = [
        (0.7, 1.0, 1),
        (0.7, 1.0, 2),
        (3.0, 0.9, 1),
        (0.7, 1.0, 1),
        (3.0, 0.3, 1),
        (0.0, 1.0, 1),
        (0.7, 1.0, 2**63 - 1),
    ]
    samplings = [Sampling(temperature, top_p, 25, seed=seed) for temperature, top_p, seed in options]
    engine = Engine(model, LETTERS)
    pieces = []
    for sampling in samplings:
        engine.add(prompt_of(6, 0), sampling)
        engine.add(prompt_of(4, 1), Sampling(max_tokens=3))  # another member in its batch
        pieces += engine.step()
    pieces += engine
    texts = [text_of(pieces, 2 * i) for i in range(len(options))]
    assert texts == [text_of(alone(model, prompt_of(6, 0), sampling)) for sampling in samplings]
    assert len(set(texts)) == len(set(options)) == len(texts) - 1


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 0.5), (0.7, 1.0), (1.3, 0.85)])
def test_one_sequence_is_sampled_as_torch_multinomial_samples_its_sorted_nucleus(model, temperature, top_p):
    """So a seed gives the same text as in versions without the engine."""
    generator = torch.Generator().manual_seed(11)
    ids = prompt_of(5, 0)
    with torch.no_grad():
        while len(ids) < 5 + 30 and ids[-1] != END:
            logits = model(torch.tensor([ids]))[0][:, -1].float()
            below_best = logits - logits.amax(dim=-1, keepdim=True)
            probs, order = torch.softmax(below_best / temperature, dim=-1).sort(dim=-1, descending=True)
            probs = probs.masked_fill(probs.cumsum(dim=-1) - probs >= top_p, 0)
            ids.append(int(order.gather(1, torch.multinomial(probs, 1, generator=generator))))
    assert text_of(alone(model, ids[:5], Sampling(temperature, top_p, 30, seed=11))) == letters(ids[5:])


# States


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_text_goes_on_from_its_state(model, temperature):
    whole = alone(model, prompt_of(7, 0), Sampling(temperature, max_tokens=20, seed=3))
    ids = [token for piece in whole for token in piece.ids]
    assert len(ids) == 20
    part = alone(model, prompt_of(7, 0), Sampling(temperature, max_tokens=8, seed=3), keep_state=True)
    assert text_of(part) == letters(ids[:8]) and [piece.state is None for piece in part] == [True] * 7 + [False]
    before = part[-1].state.map(torch.clone)
    if temperature == 0:
        rest = alone(model, [ids[7]], Sampling(max_tokens=12), state=part[-1].state)
        assert text_of(part) + text_of(rest) == text_of(whole)
    # A chat: its next turn continues from the state, beside members that begin from nothing.
    engine = Engine(model, LETTERS)
    engine.add(prompt_of(2, 8), Sampling(max_tokens=5))
    chat = engine.add([ids[7], *prompt_of(4, 9)], Sampling(max_tokens=5), state=part[-1].state)
    engine.add(prompt_of(30, 8), Sampling(max_tokens=5))
    assert text_of(list(engine), chat) == greedy(model, [*prompt_of(7, 0), *ids[:8], *prompt_of(4, 9)], 5)
    for name in ("att_shift", "wkv", "ffn_shift"):
        assert torch.equal(getattr(before, name), getattr(part[-1].state, name))


def test_only_members_that_ask_for_it_leave_a_state(model):
    assert all(piece.state is None for piece in alone(model, [1, 2], Sampling(max_tokens=3)))


def test_a_state_does_not_hold_on_to_the_batch(model):
    engine = Engine(model, LETTERS)
    for i in range(5):
        engine.add([1 + i], Sampling(max_tokens=2 + i % 2), keep_state=True)
    states = [piece.state for piece in engine if piece.state]
    assert len(states) == 5
    assert all(state.wkv.untyped_storage().nbytes() == state.wkv.nbytes for state in states)


def test_a_state_that_does_not_fit_is_refused_and_the_others_go_on(model):
    engine = Engine(model, LETTERS)
    engine.add([1, 2], Sampling(max_tokens=3))
    with torch.no_grad():
        _, two = model(torch.tensor([[1], [2]]))
    other_version = State(two.att_shift[:, :1], two.wkv[:, :1], two.ffn_shift[:, :1], 13 - two.version)
    for state, word in ((two, "att_shift"), (two.map(lambda x: x[:, :1].half()), "float16"), (other_version, "RWKV-")):
        with pytest.raises(UserError, match=word):
            engine.add([3], state=state)
    assert text_of(list(engine), 0) == greedy(model, [1, 2], 3)


# Ends


def test_stop_strings_across_tokens_and_settings_of_each_member():
    said = Scripted(b"one two three", b"one two three", b"one two three", "né stop né".encode(), b"a")
    engine = Engine(said, BYTES)
    for sampling in (
        Sampling(stop=("two", " t")),
        Sampling(stop=("e t", "o three")),
        Sampling(max_tokens=5, stop=("ne", "never")),
        Sampling(max_tokens=4, stop=("é s",)),
        Sampling(max_tokens=1),
    ):
        engine.add("q", sampling)
    pieces = list(engine)
    assert [text_of(pieces, i) for i in range(5)] == ["one", "on", "o", "né ", "a"]
    ends = {piece.member: piece.finish for piece in pieces if piece.finish}
    assert ends == {0: "stop", 1: "stop", 2: "stop", 3: "max_tokens", 4: "max_tokens"}
    assert [token for piece in pieces if piece.member == 2 for token in piece.ids] == list(b"one")


def test_pieces_are_whole_characters_and_come_at_once():
    engine = Engine(Scripted("aé😀\n\nUses\n\nUser: b".encode()), BYTES)
    engine.add("q", Sampling(stop=("\n\nUser:",)))
    texts = [piece.text for piece in engine]
    assert texts == ["a", "", "é", "", "", "", "😀", *[""] * 5, "\n\nUses", *[""] * 7]


@pytest.mark.parametrize("text", [b"a\xe4\xbd", b"a\xe4\xbd\0bc"])
def test_a_character_that_never_becomes_whole(text):
    engine = Engine(Scripted(text), BYTES)
    engine.add("q", Sampling(max_tokens=3 if b"\0" not in text else 9))
    pieces = list(engine)
    assert [piece.text for piece in pieces] == (["a", "", "\ufffd"] if b"\0" not in text else ["a", "", "", "\ufffd"])
    assert pieces[-1].finish == ("end" if b"\0" in text else "max_tokens")


def test_a_stop_string_that_the_last_token_completes_wins_over_max_tokens():
    engine = Engine(Scripted(b"abc"), BYTES)
    engine.add("q", Sampling(max_tokens=3, stop=("bc",)))
    pieces = list(engine)
    assert text_of(pieces) == "a" and pieces[-1].finish == "stop"


def test_only_the_member_whose_logits_are_not_finite_leaves(model):
    with torch.no_grad():
        _, good = model(torch.tensor([[5, 6, 7]]))
    damaged = good.map(lambda x: x * torch.nan)

    def filled() -> Engine:
        engine = Engine(model, LETTERS)
        engine.add(prompt_of(3, 0), Sampling(1.0, max_tokens=9, seed=4))
        engine.add(prompt_of(4, 1), Sampling(1.0, seed=5), state=damaged, keep_state=True)
        engine.add(prompt_of(5, 2), Sampling(max_tokens=9))
        return engine

    engine = filled()
    pieces = [piece for _ in range(20) for piece in engine.step()]
    assert [piece for piece in pieces if piece.member == 1] == [Piece(1, "", (), "not_finite", None)]
    assert text_of(pieces, 0) == text_of(alone(model, prompt_of(3, 0), Sampling(1.0, max_tokens=9, seed=4)))
    assert text_of(pieces, 2) == greedy(model, prompt_of(5, 2), 9)

    engine, pieces = filled(), []
    with pytest.raises(RunError, match="logits are not finite"):
        for piece in engine:
            pieces.append(piece)
    pieces += engine
    assert text_of(pieces, 2) == greedy(model, prompt_of(5, 2), 9)


@pytest.mark.parametrize(
    ("prompt", "word"), [([], "prompt is empty"), ("", "prompt is empty"), ([3, 64], "token 64"), ([-1], "token -1")]
)
def test_a_wrong_prompt_changes_nothing(model, prompt, word):
    engine = Engine(model, LETTERS)
    with pytest.raises(UserError, match=word):
        engine.add(prompt)
    assert len(engine) == 0 and engine.add([1]) == 0


def test_an_empty_stop_string():
    with pytest.raises(UserError, match="a stop string is empty"):
        Sampling(stop=("a", ""))
