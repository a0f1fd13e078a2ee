"""Generation: a batch gives what its prompts give one by one, and what the full forward gives."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given as hypothesis_given
from hypothesis import strategies as st

from rwkv_miss import load_model
from rwkv_miss.data.templates import TEMPLATES
from rwkv_miss.data.tokenizers import load_tokenizer
from rwkv_miss.errors import RunError, UserError
from rwkv_miss.generation.generate import generate, stream, strip_pieces
from rwkv_miss.generation.sampling import Sampling, choose
from tests.scripted import Scripted

[STOP] = STOPS = TEMPLATES["world"].stops
BYTES = load_tokenizer("bytes")
PROMPTS = ["a", "The cat sat on", "\n\n", "in the beginning", "zz"]


def full_forward_greedy(model, prompt: str, n_tokens: int) -> str:
    """The whole text is run again for each token."""
    ids = list(prompt.encode())
    for _ in range(n_tokens):
        ids.append(int(model(torch.tensor([ids]))[0][0, -1].argmax()))
    return BYTES.decode(ids[len(prompt.encode()) :])


@pytest.fixture
def model(make_base):
    return load_model(make_base(vocab_size=256), torch.float64)


@torch.no_grad()
def test_greedy_is_the_argmax_of_the_full_forward(tiny_model):
    model = load_model(tiny_model)
    for prompt in PROMPTS[:2]:
        (text,) = generate(model, BYTES, [prompt], max_tokens=24)
        assert text == full_forward_greedy(model, prompt, 24)


def test_a_batch_is_its_prompts_one_by_one(model):
    together = generate(model, BYTES, PROMPTS, max_tokens=20)
    assert together == [generate(model, BYTES, [p], max_tokens=20)[0] for p in PROMPTS]
    assert len(set(together)) == len(PROMPTS)


def test_max_tokens_and_no_prompts(model):
    assert len(generate(Scripted(b"abcdef"), BYTES, ["q"], max_tokens=3)[0]) == 3
    assert generate(model, BYTES, [], max_tokens=3) == []


def test_the_end_of_a_document_stops_one_row_alone():
    texts = generate(Scripted(b"ab\0cd", b"uvwxyz", b"\0abc"), BYTES, ["q", "longer", "r"], max_tokens=6)
    assert texts == ["ab", "uvwxyz", ""]


def test_the_next_turn_stops():
    assert STOP == "\n\nUser:"
    said = Scripted(b"yes\n\nUser: more", b"\n\nUser:~~~~~~", "é\n\nUse\n\nUser:".encode(), b"\n\nUser ~~~~~")
    assert generate(said, BYTES, ["q"] * 4, max_tokens=14, stop=STOPS) == ["yes", "", "é\n\nUse", "\n\nUser ~~~~~~~"]


def test_the_model_is_not_run_after_every_row_has_stopped():
    steps = []
    said = Scripted(b"ab\0", b"\0", b"a" + STOP.encode())
    said.head.register_forward_hook(lambda *_: steps.append(1))
    generate(said, BYTES, ["q", "r", "s"], max_tokens=100, stop=STOPS)
    assert len(steps) == 8  # for each of the 8 bytes of the last


def test_sampling_is_seeded(model):
    def sample(seed: int) -> list[str]:
        return generate(model, BYTES, PROMPTS, max_tokens=12, temperature=1.0, top_p=0.9, seed=seed)

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


def test_each_prompt_has_random_numbers_of_its_own(model):
    options = {"max_tokens": 12, "temperature": 1.0, "top_p": 0.9, "seed": 3}
    together = generate(model, BYTES, ["a", "b", "a", "a"], **options)
    assert together[0] == generate(model, BYTES, ["a"], **options)[0]
    assert together[:2] == generate(model, BYTES, ["a", "b"], **options)
    assert len({together[0], together[2], together[3]}) == 3
    for seed in range(3, 7):  # nor are they those of the seeds nearby
        assert seed == 3 or generate(model, BYTES, ["a"], **options | {"seed": seed})[0] not in together


def test_a_nucleus_of_one_is_greedy(model):
    greedy = generate(model, BYTES, PROMPTS, max_tokens=12)
    assert generate(model, BYTES, PROMPTS, max_tokens=12, temperature=1.0, top_p=1e-6) == greedy
    assert generate(model, BYTES, PROMPTS, max_tokens=12, temperature=1e-4) == greedy


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("top_p", [0.3, 0.6, 0.85, 1.0])
def test_the_distribution_that_is_sampled(temperature, top_p):
    """Within the nucleus only, in the proportion of softmax(logits / temperature), by a chi-square bound."""
    logits = torch.tensor([1.0, 3.0, 2.0, -1.0, 2.5])
    p = torch.softmax(logits.double() / temperature, 0).tolist()
    nucleus, mass = [], 0.0
    for i in sorted(range(5), key=lambda i: -p[i]):
        if mass >= top_p:
            break
        nucleus.append(i)
        mass += p[i]
    n = 20_000
    sampling = Sampling(temperature, top_p)
    chosen = choose(logits.expand(n, 5), [sampling] * n, [sampling.generator(logits.device)] * n)
    counts = torch.bincount(torch.tensor(chosen), minlength=5).tolist()
    assert {i for i in range(5) if counts[i]} <= set(nucleus)
    chi2 = sum((counts[i] - n * p[i] / mass) ** 2 / (n * p[i] / mass) for i in nucleus)
    assert chi2 < 25  # at most 4 degrees of freedom: p < 1e-4


@pytest.mark.parametrize(
    "arguments", [{"temperature": 1e-40}, {"temperature": 1e-320}, {"temperature": 1.0, "top_p": 1e-300}]
)
def test_the_tiniest_temperature_and_top_p_are_greedy(make_base, arguments):
    model = load_model(make_base(vocab_size=256))
    greedy = generate(model, BYTES, PROMPTS, max_tokens=5)
    assert generate(model, BYTES, PROMPTS, max_tokens=5, **arguments) == greedy


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite(model, temperature):
    model.ln_out.weight.data[0] = math.nan
    with pytest.raises(RunError, match="logits are not finite"):
        generate(model, BYTES, PROMPTS, max_tokens=5, temperature=temperature)


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_a_seed_out_of_range(model, seed):
    with pytest.raises(UserError, match=f"seed is {seed}"):
        generate(model, BYTES, ["a"], temperature=1.0, seed=seed)


def test_a_prompt_beyond_the_vocabulary(make_base):
    model = load_model(make_base(vocab_size=64))
    with pytest.raises(UserError, match=r"'ok~' has token 126, beyond the model's vocabulary of 64"):
        generate(model, BYTES, ["!", "ok~"], max_tokens=3)


@pytest.mark.parametrize(
    ("prompt", "arguments", "word"),
    [
        ("", {}, "prompt is empty"),
        ("a", {"temperature": -0.1}, "temperature -0.1"),
        ("a", {"temperature": math.nan}, "temperature nan"),
        ("a", {"top_p": 0.0}, "top_p 0.0"),
        ("a", {"top_p": 1.1}, "top_p 1.1"),
        ("a", {"max_tokens": 0}, "max_tokens 0"),
    ],
)
def test_wrong_arguments(model, prompt, arguments, word):
    with pytest.raises(UserError, match=word):
        generate(model, BYTES, [prompt], **arguments)


def test_a_stream_is_the_text(model):
    for prompt in PROMPTS:
        pieces = list(stream(model, BYTES, prompt, Sampling(1.0, 0.9, 30, (STOP,), seed=2)))
        assert "".join(pieces) == generate(model, BYTES, [prompt], 30, 1.0, 0.9, seed=2, stop=STOPS)[0]
        assert "" not in pieces
    with pytest.raises(UserError, match="prompt is empty"):
        stream(model, BYTES, "", Sampling())


@hypothesis_given(st.lists(st.text(" \n\ta\u00a0b", max_size=4)))
def test_stripped_pieces(pieces):
    stripped = list(strip_pieces(pieces))
    assert "".join(stripped) == "".join(pieces).strip()
    assert all(stripped)
    for n in range(len(pieces)):  # after every piece, all but the white space at the end has come
        assert "".join(strip_pieces(pieces[:n])) == "".join(pieces[:n]).strip()
