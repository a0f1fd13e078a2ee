"""How good a model is on data: loss per token, and how often its answer is the right one."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from rwkv_miss.data.batches import BatchStream
from rwkv_miss.data.documents import Document, encode_record
from rwkv_miss.data.packing import make_rows
from rwkv_miss.data.records import Record
from rwkv_miss.data.templates import answer_text, prompt_text
from rwkv_miss.data.tokenizers import Tokenizer
from rwkv_miss.generate import generate
from rwkv_miss.model.log_probs import batch_log_probs

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
    model: nn.Module, tokenizer: Tokenizer, records: Sequence[Record], ctx_len: int, batch_size: int
) -> tuple[float, int]:
    """As `documents_loss`, of records."""
    documents = [encode_record(record, tokenizer, model.config.vocab_size) for record in records]
    return documents_loss(model, documents, ctx_len, batch_size)


@torch.no_grad()
def documents_loss(model: nn.Module, documents: Sequence[Document], ctx_len: int, batch_size: int) -> tuple[float, int]:
    """(mean of -log p over the tokens that carry loss, their number), rows packed as training packs them.
    Warns where ctx_len cuts documents off, or all of their loss."""
    rows, report = make_rows(documents, ctx_len, packing=True)
    if report.truncated or report.dropped:
        _log.warning(
            "of %s records, %s lose their ends to ctx_len %s and %s have no token with loss in it",
            *(report.records, report.truncated, ctx_len, report.dropped),
        )
    stream = BatchStream(
        rows, batch_size=batch_size, accumulate=1, rank=0, world_size=1, seed=0, shuffle=False, trim=False
    )
    device = model.emb.weight.device
    total = 0.0
    for batch in stream:
        on_device = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
        total -= batch_log_probs(model, on_device)[0].item()
    return total / report.loss_tokens, report.loss_tokens


def perplexity(loss: float) -> float:
    return math.inf if loss > 700 else math.exp(loss)


def answers(
    model: nn.Module, tokenizer: Tokenizer, records: Sequence[Record], max_tokens: int, batch_size: int
) -> list[Answer]:
    """The model's likeliest answer to each record's last question. Right means equal, white space at the ends
    aside."""
    # Prompts of about one length side by side: a batch runs as long as its longest.
    order = sorted(range(len(records)), key=lambda i: len(prompt_text(records[i])))
    given: dict[int, str] = {}
    for start in range(0, len(order), batch_size):
        chunk = order[start : start + batch_size]
        texts = generate(model, tokenizer, [prompt_text(records[i]) for i in chunk], max_tokens)
        given.update(zip(chunk, (text.strip() for text in texts), strict=True))
    return [Answer(prompt_text(r), answer_text(r), given[i]) for i, r in enumerate(records)]
