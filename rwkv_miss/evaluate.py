"""How good a model is on data: its loss per token, and how often its answer is the right one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from rwkv_miss.config import DataOptions, EvalConfig
from rwkv_miss.data.batches import BatchStream
from rwkv_miss.data.binidx import binidx_prefix
from rwkv_miss.data.documents import Document, encode_record
from rwkv_miss.data.mapped import open_documents
from rwkv_miss.data.packing import check_losses, make_rows
from rwkv_miss.data.readers.reader import read_records
from rwkv_miss.data.records import Record
from rwkv_miss.data.templates import STOP, answer_text, prompt_text
from rwkv_miss.data.tokenizers import Tokenizer, load_tokenizer
from rwkv_miss.errors import UserError
from rwkv_miss.generation.engine import Engine
from rwkv_miss.generation.sampling import Sampling
from rwkv_miss.model.base import RWKV
from rwkv_miss.model.log_probs import batch_log_probs
from rwkv_miss.progress import Report, no_progress


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
    options: DataOptions,
    ctx_len: int,
    batch_size: int,
    report: Report | None = None,
) -> tuple[float, int]:
    """As `documents_loss`, of records."""
    documents = [encode_record(record, tokenizer, model.config.vocab_size, options) for record in records]
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
    so if ctx_len loses more of the documents than is `tolerated`.

    Args:
        report: is called after each batch with the rows done and the rows in all.
    """
    rows, packing = make_rows(documents, ctx_len, packing=True)
    check_losses(packing, "the loss is over a part of the data", allow_dropping=True)
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
    options: DataOptions,
    max_tokens: int,
    batch_size: int,
    report: Report | None = None,
) -> list[Answer]:
    """The model's likeliest answer to each record's last question. Right means equal to the answer in the form that
    the model learns, white space at the ends aside.

    Args:
        max_tokens: where an answer is cut off.
        batch_size: questions that are answered together: one that has its answer is replaced by the next at once.
        report: is called now and then with the questions answered and the questions in all.

    Raises:
        UserError: a record has no question and answer, or its tokens are not those of the model.
        RunError: the model's logits are not finite.
    """
    prompts = [prompt_text(record, options) for record in records]
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
        Answer(prompt, answer_text(record, options), text)
        for prompt, record, text in zip(prompts, records, given, strict=True)
    ]


@dataclass(frozen=True)
class Evaluation:
    """What a model was found to be on data: the mean of -log p in nats over the `tokens` that carry loss, and its
    answers if they were asked for."""

    records: int
    loss: float
    tokens: int
    answers: list[Answer] | None

    def figures(self) -> dict[str, Any]:
        """The results by name, as they are written to JSON. That has neither NaN nor infinity: they become None."""
        found: dict[str, Any] = {"records": self.records, "tokens": self.tokens}
        for name, value in (("loss", self.loss), ("perplexity", perplexity(self.loss))):
            found[name] = value if math.isfinite(value) else None
        if self.answers is not None:
            right = sum(answer.is_right for answer in self.answers)
            found |= {"right": right, "exact_match": right / len(self.answers)}
        return found


def evaluate(
    model: RWKV, config: EvalConfig, show: Callable[[str], AbstractContextManager[Report]] = no_progress
) -> Evaluation:
    """Measures a model as `config` says; `config.model` and `config.adapter` are what it was loaded from. Answers are
    not asked for where the loss is not finite.

    Args:
        show: shows how far each part is, such as `rwkv_miss.progress.show_progress`.

    Raises:
        UserError: the data cannot be read, or has no questions where answers are wanted.
        RunError: the model's logits are not finite while it answers.
    """
    tokenizer = load_tokenizer(config.tokenizer)
    if prefix := binidx_prefix(config.data):
        if config.exact_match:
            raise UserError(f"{config.data}: a binidx has no questions and answers; leave out exact_match")
        documents = open_documents(prefix, model.config.vocab_size, config)[: config.limit]
        with show("rows of the loss") as report:
            loss, tokens = documents_loss(model, documents, config.ctx_len, config.batch_size, report)
        return Evaluation(len(documents), loss, tokens, None)
    records = list(islice(read_records(config.data, config), config.limit))
    with show("rows of the loss") as report:
        loss, tokens = mean_loss(model, tokenizer, records, config, config.ctx_len, config.batch_size, report)
    given = None
    if config.exact_match and math.isfinite(loss):
        with show("answers") as report:
            given = answers(model, tokenizer, records, config, config.max_tokens, config.batch_size, report)
    return Evaluation(len(records), loss, tokens, given)
