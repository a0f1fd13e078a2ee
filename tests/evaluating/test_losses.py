"""The loss on documents, packed and batched, is that of each document alone."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import kl_divergence

from rwkv_miss import load_model
from rwkv_miss.config import DataOptions
from rwkv_miss.data.documents import Document, encode_record
from rwkv_miss.data.records import Record, Turn
from rwkv_miss.data.rendering import render
from rwkv_miss.data.tokenizers import load_tokenizer
from rwkv_miss.evaluating import losses
from rwkv_miss.evaluating.evaluate import Evaluation
from rwkv_miss.evaluating.losses import Forgetting, documents_loss, forgetting
from rwkv_miss.evaluating.rates import perplexity
from rwkv_miss.model.base import RWKV
from tests.evaluating.records import record

OPTIONS = DataOptions()
BYTES = load_tokenizer("bytes")


RECORDS = [record("1+1?", "2"), record("a longer question", "and its answer"), Record("here", (Turn("text", "abc"),))]


def documents(records: list[Record]) -> list[Document]:
    return [encode_record(r, BYTES, 256, OPTIONS) for r in records]


@torch.no_grad()
def by_hand(*models: RWKV) -> list[tuple[int, list[Tensor]]]:
    """Each of RECORDS' tokens that carry loss, with each model's logits for it, run on that record alone."""
    found = []
    for r in RECORDS:
        ids, carries_loss = [], []
        for text, is_answer in render(r, OPTIONS):
            ids += list(text.encode())
            carries_loss += [is_answer] * len(text.encode())
        ids, carries_loss = [*ids, 0], [*carries_loss, True]
        logits = [model(torch.tensor([ids]))[0][0] for model in models]
        found += [(ids[i], [x[i - 1] for x in logits]) for i in range(1, len(ids)) if carries_loss[i]]
    return found


def mean_nll(found: list[tuple[int, list[Tensor]]], which: int) -> float:
    return -sum(logits[which].log_softmax(-1)[token].item() for token, logits in found) / len(found)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_mean_loss_is_that_of_each_record_alone(model, batch_size):
    found = by_hand(model)
    loss, n_tokens = documents_loss(model, documents(RECORDS), ctx_len=64, batch_size=batch_size)
    assert n_tokens == len(found)
    assert loss == pytest.approx(mean_nll(found, 0), rel=1e-6)
    assert perplexity(loss) == pytest.approx(math.exp(mean_nll(found, 0)), rel=1e-5)


@pytest.mark.parametrize("most_logits", [1, 5 * 256, 2**20])
def test_forgetting_is_the_divergence_of_each_record_alone(model, make_base, monkeypatch, most_logits):
    monkeypatch.setattr(losses, "_MAX_LOGITS", most_logits)
    base = load_model(make_base(vocab_size=256, seed=5))
    found = by_hand(base, model)
    categorical = torch.distributions.Categorical
    divergences = [kl_divergence(*(categorical(logits=x.double()) for x in logits)).item() for _, logits in found]
    said = forgetting(model, base, documents(RECORDS), ctx_len=64, batch_size=2)
    assert said.tokens == len(found)
    assert said.base_loss == pytest.approx(mean_nll(found, 0), rel=1e-6)
    assert said.loss == pytest.approx(mean_nll(found, 1), rel=1e-6)
    assert said.kl == pytest.approx(sum(divergences) / len(found), rel=1e-5)
    same = forgetting(base, base, documents(RECORDS), ctx_len=64, batch_size=2)
    assert same.kl == 0 and same.loss == same.base_loss


def test_perplexity_of_a_huge_loss():
    assert perplexity(0.0) == 1 and perplexity(1e6) == math.inf and math.isnan(perplexity(math.nan))


def test_the_rows_of_the_loss_are_reported(model):
    records = [record("q" * 20, "a" * 30) for _ in range(5)]
    done = []
    documents_loss(model, documents(records), ctx_len=64, batch_size=2, report=lambda *x: done.append(x))
    assert done == [(2, 5), (4, 5), (5, 5)]


def test_figures_that_json_has_no_numbers_for_are_none():
    assert Evaluation(3, math.nan, 9, None).figures() == {"records": 3, "tokens": 9, "loss": None, "perplexity": None}
    assert Evaluation(3, 1e4, 9, None).figures() == {"records": 3, "tokens": 9, "loss": 1e4, "perplexity": None}
    assert "forgetting" not in Evaluation(4, 1.0, 9, [], {"right": 1}).figures()
    found = Evaluation(4, 1.0, 9, [], {"right": 1}, Forgetting(5, 1.0, math.inf, math.nan)).figures()
    assert found["forgetting"] == {"tokens": 5, "base_loss": 1.0, "loss": None, "kl": None}
    assert found["right"] == 1 and found["perplexity"] == pytest.approx(math.e)


def test_a_loss_of_a_part_says_so(model, caplog):
    records = [Record(f"r:{n}", (Turn("user", "q"), Turn("assistant", "a" * n))) for n in (1, 90, 200)]
    records.append(Record("r:4", (Turn("user", "q" * 90), Turn("assistant", "a"))))
    documents_loss(model, documents(records[:1]), ctx_len=64, batch_size=2)
    assert "ctx_len" not in caplog.text
    documents_loss(model, documents(records), ctx_len=64, batch_size=2)
    [said] = [message for message in caplog.messages if "ctx_len" in message]
    assert "of 4 records, 2 lose their ends to ctx_len 64 and 1 have nothing left to learn" in said
    assert "with 205 of 300 loss tokens; ctx_len 220 would keep 99 %" in said
