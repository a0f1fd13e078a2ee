"""How good a model is on data: its loss per token, and how often its answer is the right one."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from rwkv_miss.data.batches import BatchStream
from rwkv_miss.data.documents import Document, encode_record
from rwkv_miss.data.packing import make_rows
from rwkv_miss.data.records import Record
from rwkv_miss.data.templates import answer_text, prompt_text
from rwkv_miss.data.tokenizers import Tokenizer
from rwkv_miss.generation.engine import Engine
from rwkv_miss.generation.generate import STOP
from rwkv_miss.generation.sampling import Sampling
from rwkv_miss.model.base import RWKV
from rwkv_miss.model.log_probs import batch_log_probs
from rwkv_miss.progress import Report

_log = logging.getLogger("rwkv_miss")


@dataclass(frozen=True)
class Answer:
    """What a model was asked (`prompt`), the answer in the data (`expected`), and the model's (`given`)."""

    prompt: str
    expected: str
    given: str

    @property
    def is_right(self) -> bool:
        return self.given == self.expected


def mean_loss(
    model: RWKV,
    tokenizer: Tokenizer,
    records: Sequence[Record],
    ctx_len: int,
    batch_size: int,
    report: Report | None = None,
) -> tuple[float, int]:
    """As `documents_loss`, of records."""
    documents = [encode_record(record, tokenizer, model.config.vocab_size) for record in records]
    return documents_loss(model, documents, ctx_len, batch_size, report)


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
    how many documents are cut off by ctx_len, and how many of them have no token with loss left.

    Args:
        report: is called after each batch with the rows done and the rows in all.
    """
    rows, packing = make_rows(documents, ctx_len, packing=True)
    if packing.truncated or packing.dropped:
        _log.warning(
            "of %s records, %s lose their ends to ctx_len %s and %s have no token with loss in it",
            *(packing.records, packing.truncated, ctx_len, packing.dropped),
        )
    stream = BatchStream(
        rows, batch_size=batch_size, accumulate=1, rank=0, world_size=1, seed=0, shuffle=False, trim=False
    )
    device = model.emb.weight.device
    total, done = 0.0, 0
    for batch in stream:
        on_device = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
        total -= batch_log_probs(model, on_device)[0].item()
        done += len(batch["tokens"])
        if report:
            report(done, len(rows))
    return total / packing.loss_tokens, packing.loss_tokens


def perplexity(loss: float) -> float:
    """e^loss, or infinity where that is more than a float can hold."""
    return math.inf if loss > 700 else math.exp(loss)


def answers(
    model: RWKV,
    tokenizer: Tokenizer,
    records: Sequence[Record],
    max_tokens: int,
    batch_size: int,
    report: Report | None = None,
) -> list[Answer]:
    """The model's likeliest answer to each record's last question. Right means equal, white space at the ends
    aside.

    Args:
        max_tokens: where an answer is cut off.
        batch_size: questions that are answered together: one that has its answer is replaced by the next at once.
        report: is called now and then with the questions answered and the questions in all.

    Raises:
        UserError: a record has no question and answer, or its tokens are not those of the model.
        RunError: the model's logits are not finite.
    """
    prompts = [prompt_text(record) for record in records]
    # Prompts of about one length join together, so that they need little padding. The longest come first: what needs
    # most memory does not fail at the end, and the time that is left is not underestimated.
    waiting = iter(sorted(range(len(prompts)), key=lambda i: -len(prompts[i])))
    engine = Engine(model, tokenizer)
    sampling = Sampling(max_tokens=max_tokens, stop=(STOP,))
    index: dict[int, int] = {}  # of a member's record
    texts: list[list[str]] = [[] for _ in records]
    n_answered = 0

    def ask() -> None:
        for i in islice(waiting, batch_size - len(engine)):
            index[engine.add(prompts[i], sampling)] = i

    ask()
    for piece in engine:
        texts[index[piece.member]].append(piece.text)
        if piece.finish:
            n_answered += 1
            ask()
        if report:
            report(n_answered, len(records))
    given = ("".join(pieces).strip() for pieces in texts)
    return [
        Answer(prompt, answer_text(record), text) for prompt, record, text in zip(prompts, records, given, strict=True)
    ]


def figures(n_records: int, loss: float, n_tokens: int, given: Sequence[Answer] | None = None) -> dict[str, Any]:
    """The results by name, as they are written to JSON. That has neither NaN nor infinity: they become None."""
    named: dict[str, Any] = {"records": n_records, "tokens": n_tokens, "loss": loss, "perplexity": perplexity(loss)}
    named = {name: value if math.isfinite(value) else None for name, value in named.items()}
    if given is not None:
        n_right = sum(answer.is_right for answer in given)
        named |= {"right": n_right, "exact_match": n_right / len(given)}
    return named
