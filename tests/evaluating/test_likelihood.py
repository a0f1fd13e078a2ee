"""The likelihood of texts, whatever runs beside them and however long they are, is that of each alone."""

from __future__ import annotations

import math

import pytest
import torch

from rwkv_miss.errors import RunError
from rwkv_miss.evaluating import likelihood
from rwkv_miss.evaluating.likelihood import likelihoods


@pytest.fixture
@torch.no_grad()
def pairs(model) -> list[tuple[list[int], list[int]]]:
    """Of several lengths; every other text is what the model would write."""
    found = []
    for n, prompt in enumerate([b"a", b"in the beginning", b"zz", b"q" * 40, b"b"]):
        ids = list(prompt)
        for _ in range(1 + 3 * n):
            ids.append(int(model(torch.tensor([ids]))[0][0, -1].argmax()))
        text = ids[len(prompt) :]
        found += [(list(prompt), text), (list(prompt), [*text[:-1], (text[-1] + 1) % 256])]
    return found


@torch.no_grad()
def by_hand(model, prompt: list[int], text: list[int]) -> tuple[float, bool]:
    log_p = model(torch.tensor([prompt + text]))[0][0].log_softmax(-1)[len(prompt) - 1 : -1]
    return sum(row[token].item() for row, token in zip(log_p, text, strict=True)), log_p.argmax(-1).tolist() == text


@pytest.mark.parametrize(("batch_size", "positions", "logits"), [(1, 8192, 2**20), (4, 8192, 256), (10, 40, 2560)])
def test_each_text_has_the_likelihood_that_it_has_alone(model, pairs, monkeypatch, batch_size, positions, logits):
    monkeypatch.setattr(likelihood, "_MAX_POSITIONS", positions)
    monkeypatch.setattr(likelihood, "_MAX_LOGITS", logits)
    done = []
    found = likelihoods(model, pairs, batch_size, lambda *x: done.append(x))
    expected = [by_hand(model, *pair) for pair in pairs]
    assert [x.log_p for x in found] == pytest.approx([log_p for log_p, _ in expected], rel=1e-5)
    assert [x.is_likeliest for x in found] == [is_likeliest for _, is_likeliest in expected]
    assert sum(x.is_likeliest for x in found) == len(pairs) // 2
    assert done[-1] == (len(pairs), len(pairs)) and len(done) == math.ceil(len(pairs) / batch_size)


def test_logits_that_are_not_finite(model, pairs):
    model.ln_out.weight.data[0] = math.nan
    with pytest.raises(RunError, match="logits are not finite"):
        likelihoods(model, pairs, 4)
