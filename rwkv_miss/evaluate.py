"""How good a model is on data: loss per token, and how often its answer is the right one."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from rwkv_miss.config import DataOptions
from rwkv_miss.data.batches import BatchStream
from rwkv_miss.data.documents import Document, encode_record
from rwkv_miss.data.packing import check_losses, make_rows
from rwkv_miss.data.records import Record
from rwkv_miss.data.templates import answer_text, prompt_text
from rwkv_miss.data.tokenizers import Tokenizer
from rwkv_miss.generate import generate
from rwkv_miss.model.loss import loss_sum

_log = logging.getLogger("rwkv_miss")


@dataclass(frozen=True)
class Answer:
    prompt: str
    expected: str
    given: str

    @property
    def is_right(self) -> bool:
        return self.given == self.expected


def mean_loss(
    model: nn.Module,
    tokenizer: Tokenizer,
    records: Sequence[Record],
    options: DataOptions,
    ctx_len: int,
    batch_size: int,
) -> tuple[float, int]:
    """As `documents_loss`, of records."""
    documents = [encode_record(record, tokenizer, model.config.vocab_size, options) for record in records]
    return documents_loss(model, documents, ctx_len, batch_size)


@torch.no_grad()
def documents_loss(model: nn.Module, documents: Sequence[Document], ctx_len: int, batch_size: int) -> tuple[float, int]:
    """(mean of -log p over the tokens that carry loss, their number), rows packed as training packs them.
    Warns if ctx_len loses more of the documents than is `tolerated`."""
    rows, report = make_rows(documents, ctx_len, packing=True)
    check_losses(report, "the loss is over a part of the data", allow_dropping=True)
    stream = BatchStream(
        rows, batch_size=batch_size, accumulate=1, rank=0, world_size=1, seed=0, shuffle=False, trim=False
    )
    device = model.emb.weight.device
    total = 0.0
    for batch in stream:
        on_device = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
        total += loss_sum(model, on_device)[0].item()
    return total / report.loss_tokens, report.loss_tokens


def perplexity(loss: float) -> float:
    return math.inf if loss > 700 else math.exp(loss)


def answers(
    model: nn.Module,
    tokenizer: Tokenizer,
    records: Sequence[Record],
    options: DataOptions,
    max_tokens: int,
    batch_size: int,
) -> list[Answer]:
    """The model's likeliest answer to each record's last question. Right means equal to the answer in the form that
    the model learns, white space at the ends aside."""
    prompts = [prompt_text(record, options) for record in records]
    # Prompts of about one length side by side: a batch runs as long as its longest.
    order = sorted(range(len(records)), key=lambda i: len(prompts[i]))
    given: dict[int, str] = {}
    for start in range(0, len(order), batch_size):
        chunk = order[start : start + batch_size]
        texts = generate(model, tokenizer, [prompts[i] for i in chunk], max_tokens)
        given.update(zip(chunk, (text.strip() for text in texts), strict=True))
    return [Answer(prompts[i], answer_text(record, options), given[i]) for i, record in enumerate(records)]
