"""The loss of a model on documents, and how far it is from its base."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from rwkv_miss.data.batches import BatchStream
from rwkv_miss.data.documents import Document
from rwkv_miss.data.packing import check_losses, make_rows
from rwkv_miss.model.base import RWKV
from rwkv_miss.model.log_probs import batch_log_probs
from rwkv_miss.progress import Report

# Logits of each of two models that are compared at a time: 32 MiB in fp32, of which a few such tensors are needed.
_MAX_LOGITS = 8 * 2**20


@torch.no_grad()
def documents_loss(
    model: RWKV,
    documents: Sequence[Document],
    ctx_len: int,
    batch_size: int,
    report: Report | None = None,
) -> tuple[float, int]:
    """The mean of -log p, in nats, over the tokens that carry loss, and the number of these tokens.

    Documents are packed into rows of ctx_len tokens as in training, and batch_size rows run together. A warning says
    so if ctx_len loses more of the documents than is `tolerated`.

    Args:
        report: is called after each batch with the rows done and the rows in all.
    """
    total, tokens = 0.0, 0
    for batch in _batches(model, documents, ctx_len, batch_size, report):
        total -= batch_log_probs(model, batch)[0].item()
        tokens += batch["step_tokens"]
    return total / tokens, tokens


def _batches(
    model: RWKV, documents: Sequence[Document], ctx_len: int, batch_size: int, report: Report | None
) -> Iterator[dict[str, Any]]:
    """The documents as batches of rows, on the model's device. Those that went before are reported."""
    rows, packing = make_rows(documents, ctx_len, packing=True)
    check_losses(packing, "the loss is over a part of the data", allow_dropping=True)
    stream = BatchStream(
        rows, batch_size=batch_size, accumulate=1, rank=0, world_size=1, seed=0, shuffle=False, trim=False
    )
    device, done = model.emb.weight.device, 0
    for batch in stream:
        yield {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
        done += len(batch["tokens"])
        if report:
            report(done, len(rows))


@dataclass(frozen=True)
class Forgetting:
    """How far a model is from its base on text, per token that carries loss, in nats: the losses (the mean of -log p)
    of both, and the mean of KL(base || model), the divergence of the distributions of the next token."""

    tokens: int
    base_loss: float
    loss: float
    kl: float


@torch.no_grad()
def forgetting(
    model: RWKV,
    base: RWKV,
    documents: Sequence[Document],
    ctx_len: int,
    batch_size: int,
    report: Report | None = None,
) -> Forgetting:
    """Compares a model with its base on documents, which are run as by `documents_loss`. The logits of some positions
    at a time are in memory.

    Args:
        base: has the model's vocabulary and is on its device.
    """
    size = max(1, _MAX_LOGITS // model.config.vocab_size)
    base_loss = loss = kl = 0.0
    tokens = 0
    for batch in _batches(model, documents, ctx_len, batch_size, report):
        has_target = batch["targets"] >= 0
        hidden = [x.hidden(batch["tokens"], None, batch["seq_start"])[0][has_target] for x in (base, model)]
        for theirs, ours, targets in zip(
            *(x.split(size) for x in (*hidden, batch["targets"][has_target])), strict=True
        ):
            p, q = base.head(theirs).float().log_softmax(-1), model.head(ours).float().log_softmax(-1)
            base_loss += F.nll_loss(p, targets, reduction="sum").item()
            loss += F.nll_loss(q, targets, reduction="sum").item()
            kl += F.kl_div(q, p, reduction="sum", log_target=True).item()
        tokens += batch["step_tokens"]
    return Forgetting(tokens, base_loss / tokens, loss / tokens, kl / tokens)
