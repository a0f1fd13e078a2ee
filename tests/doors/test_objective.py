"""An objective is one file and one line of a table: the toy's loss in packed rows is that of its pairs one by one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.functional import log_softmax, logsigmoid

from rwkv_miss import AdapterConfig, inject, load_adapter, load_model, merge
from rwkv_miss.adapters.inject import trained_parameters
from rwkv_miss.data.batches import BatchStream
from rwkv_miss.data.packing import make_rows
from rwkv_miss.errors import UserError
from rwkv_miss.model.log_probs import batch_log_probs
from rwkv_miss.training.objective import OBJECTIVES
from tests.data.samples import read_documents
from tests.doors.toy_objective import OBJECTIVE
from tests.training.runs import adapter, losses, quiet_train, small_config


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    monkeypatch.setitem(OBJECTIVES, "pairs", "tests.doors.toy_objective")


@pytest.fixture
def config(base, tmp_path):
    """11 pairs: the answer that counts up is to be likelier than the one that repeats itself."""
    data = tmp_path / "pairs.jsonl"
    pairs = []
    for n in range(1, 12):
        pairs.append({"question": f"go {n}", "answer": " ".join(str(i) for i in range(n))})
        pairs.append({"question": f"go {n}", "answer": " ".join(["no"] * (12 - n))})
    data.write_text("".join(json.dumps(record) + "\n" for record in pairs))
    settings = replace(small_config(base, data, tmp_path / "run"), objective="pairs", packing=True, ctx_len=256)
    return replace(settings, batch_size=2, max_steps=6, schedule="constant")


def pair_losses(model, config) -> torch.Tensor:
    """The loss of each pair, from the logits of each document alone."""
    scores = []
    for document in read_documents(config.data, config):
        ids = torch.from_numpy(document.ids).long()
        log_p = log_softmax(model(ids[None, :-1])[0][0], dim=-1).gather(1, ids[1:, None])[:, 0]
        scores.append((log_p * torch.from_numpy(document.mask[1:])).sum())
    first, second = torch.stack(scores).view(-1, 2).unbind(1)
    return -logsigmoid(first - second)


@pytest.mark.parametrize("max_logits", [None, 256 * 5])
@pytest.mark.parametrize("chunk_len", [None, 16])
def test_the_loss_and_its_gradients_are_those_of_the_pairs_alone(config, monkeypatch, chunk_len, max_logits):
    """Also where the head computes its logits in pieces, and rows run in chunks; the head itself is trained."""
    if max_logits:
        monkeypatch.setattr("rwkv_miss.ops.log_probs._MAX_LOGITS", max_logits)
    model = inject(load_model(config.base), AdapterConfig(r=4, modules_to_save=["head"]))
    documents = read_documents(config.data, config)
    rows, _ = make_rows(documents, config.ctx_len, packing=True, group_size=2)
    [batch] = BatchStream(rows, batch_size=99, accumulate=1, rank=0, world_size=1, seed=0, shuffle=False, trim=False)
    assert len(batch["tokens"]) < 11 and batch["step_groups"] == OBJECTIVE.terms(batch) == 11
    log_probs, _ = batch_log_probs(model, batch, None, chunk_len, "none")
    mine, expected = OBJECTIVE.loss_sum(log_probs, batch), pair_losses(model, config).sum()
    torch.testing.assert_close(mine, expected, rtol=1e-5, atol=0)
    trained = list(trained_parameters(model).values())
    for x, y in zip(torch.autograd.grad(mine, trained), torch.autograd.grad(expected, trained), strict=True):
        assert (x - y).norm() <= 1e-5 * y.norm() > 0


@pytest.mark.slow
def test_it_trains_validates_resumes_and_merges(config, tmp_path):
    config = replace(config, val_data=config.data, val_every=3)
    result = quiet_train(config)
    with torch.no_grad():
        base = pair_losses(load_model(config.base), config).mean().item()
        best = pair_losses(load_adapter(load_model(config.base), config.out), config).mean().item()
    assert result.base_val_loss == pytest.approx(base, rel=1e-5)
    assert result.best_val_loss == pytest.approx(best, rel=1e-4) and best < 0.7 * base

    first = replace(config, out=str(tmp_path / "parts"), max_steps=3)
    quiet_train(first)
    quiet_train(replace(first, max_steps=6, resume="auto"))
    assert losses(first.out) == losses(config.out)
    with pytest.raises(UserError, match="objective was pairs, is cross_entropy"):
        quiet_train(replace(first, max_steps=7, resume="auto", objective="cross_entropy"))
    merge(config.base, config.out, tmp_path / "merged.pth")


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"batch_size": 1, "accumulate": 2}, {"chunk_len": 16}, {"packing": False}])
def test_however_the_rows_are_laid_out_the_run_is_the_same(config, tmp_path, changes):
    whole = replace(config, batch_size=99, max_steps=2)
    if "accumulate" in changes:  # so that a step has the same rows
        whole = replace(config, max_steps=2)
    quiet_train(whole)
    other = replace(whole, out=str(tmp_path / "other"), **changes)
    quiet_train(other)
    assert losses(other.out) == pytest.approx(losses(whole.out), rel=2e-5)
    for name, block in adapter(whole.out).items():
        torch.testing.assert_close(block, adapter(other.out)[name], rtol=2e-3, atol=2e-5)


def test_ranks_share_the_pairs_out(config):
    """Each rank divides its sum by the step's number of pairs; the results add up to the mean of one process."""
    model = load_model(config.base)
    documents = read_documents(config.data, config)
    rows, _ = make_rows(documents, config.ctx_len, packing=True, group_size=2)

    def step(rank: int, world_size: int) -> float:
        settings = dict(batch_size=8 // world_size, accumulate=1, seed=0, shuffle=True, trim=False)
        batch = next(iter(BatchStream(rows, rank=rank, world_size=world_size, **settings)))
        with torch.no_grad():
            log_probs, _ = batch_log_probs(model, batch, reduction="none")
            return (OBJECTIVE.loss_sum(log_probs, batch) / OBJECTIVE.terms_of_step(batch)).item()

    assert step(0, 2) + step(1, 2) == pytest.approx(step(0, 1), rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"objective": "dpo"}, "objective is 'dpo'; there are cross_entropy, pairs"),
        ({"chunk_len": 16, "bptt_chunks": 1}, "objective pairs needs whole rows, but bptt_chunks is 1"),
        ({"long_documents": "carry"}, "records that are learned in groups cannot go on"),
    ],
)
def test_what_it_cannot_have(config, changes, said):
    with pytest.raises(UserError, match=said):
        quiet_train(replace(config, **changes))
    assert not Path(config.out).exists()
