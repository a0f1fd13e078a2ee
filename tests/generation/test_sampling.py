"""Penalties, biases and log-probabilities."""

from __future__ import annotations

import pytest
import torch

from rwkv_miss import load_model
from rwkv_miss.data.tokenizers import load_tokenizer
from rwkv_miss.errors import UserError
from rwkv_miss.generation.engine import Engine
from rwkv_miss.generation.sampling import MOST_LOGPROBS, Sampling
from tests.generation.letters import LETTERS, ids_of, prompt_of, text_of
from tests.scripted import Scripted


@pytest.mark.parametrize("temperature", [0.0, 1.3])
@torch.no_grad()
def test_penalties_and_biases_of_each_member(either_base, temperature):
    """logit - count * frequency - (count > 0) * presence, as OpenAI's API defines it, and the bias, before the
    temperature."""
    model = load_model(either_base, torch.float64).eval()
    model.head.weight.data[0] = 0
    settings = [(0.0, 0.0, {}), (2.0, 0.0, {}), (0.0, 1.5, {}), (-2.0, 0.3, {}), (0.0, 0.0, {7: 100.0}), (1, 1, {7: 3})]
    samplings = [Sampling(temperature, 0.9, 20, (), 5, None, *setting) for setting in settings]
    engine = Engine(model, LETTERS)
    for sampling in samplings:
        engine.add(prompt_of(6, 0), sampling)
    pieces = list(engine)
    for i, (presence, frequency, bias) in enumerate(settings):
        generator = torch.Generator().manual_seed(5)
        ids: list[int] = []
        while len(ids) < 20 and 0 not in ids:
            logits = model(torch.tensor([prompt_of(6, 0) + ids]))[0][0, -1].float()
            for token in range(64):
                logits[token] -= ids.count(token) * frequency + (token in ids) * presence
                logits[token] += bias.get(token, 0.0)
            if temperature:
                probs, order = (logits / temperature).softmax(0).sort(descending=True)
                probs[probs.cumsum(0) - probs >= 0.9] = 0
                ids.append(int(order[torch.multinomial(probs, 1, generator=generator)]))
            else:
                ids.append(int(logits.argmax()))
        assert ids_of(pieces, i) == ids, settings[i]
    assert len({text_of(pieces, i) for i in range(len(settings))}) >= 5


@torch.no_grad()
def test_log_probabilities_are_the_models_own(either_base):
    """Whatever changes the choice; of the members that ask for them alone."""
    model = load_model(either_base, torch.float64).eval()
    engine = Engine(model, LETTERS)
    asked = [None, 0, 3, MOST_LOGPROBS]
    for n in asked:
        engine.add(prompt_of(4, 1), Sampling(2.0, 1.0, 9, (), 3, n, 2.0, 1.0, {5: 4.0}))
    pieces = list(engine)
    ids = ids_of(pieces, 0)
    log_p = model(torch.tensor([prompt_of(4, 1) + ids]))[0][0, 3:].float().log_softmax(-1)
    for i, n in enumerate(asked):
        assert ids_of(pieces, i) == ids
        found = [(piece.ids, piece.logprobs) for piece in pieces if piece.member == i]
        for place, (tokens, told) in enumerate(found):
            if n is None:
                assert told == ()
                continue
            assert tuple(one.id for one in told) == tokens
            [one] = told
            assert one.logprob == pytest.approx(log_p[place, one.id].item(), abs=1e-5)
            values, likeliest = log_p[place].topk(n)
            assert [token for token, _ in one.top] == likeliest.tolist()
            assert [value for _, value in one.top] == pytest.approx(values.tolist(), abs=1e-5)


def test_log_probabilities_of_a_last_token():
    engine = Engine(Scripted(b"ab"), load_tokenizer("bytes"))
    engine.add("q", Sampling(max_tokens=2, stop=("b",), logprobs=1))
    pieces = list(engine)
    assert [(piece.text, [one.id for one in piece.logprobs]) for piece in pieces] == [("a", [97]), ("", [98])]


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"logprobs": -1}, "logprobs is -1; it must be from 0 to 20"),
        ({"logprobs": 21}, "logprobs is 21"),
        ({"presence_penalty": 2.5}, "presence_penalty is 2.5; it must be from -2 to 2"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty is nan"),
        ({"logit_bias": {3: -101}}, "logit_bias of token 3 is -101"),
    ],
)
def test_out_of_range(options, word):
    with pytest.raises(UserError, match=word):
        Sampling(**options)


def test_a_bias_of_a_token_that_the_model_lacks(make_base):
    engine = Engine(load_model(make_base()), LETTERS)
    with pytest.raises(UserError, match="logit_bias has token 64; the model has the tokens 0 to 63"):
        engine.add([1], Sampling(logit_bias={3: 1.0, 64: 1.0}))
    assert len(engine) == 0
