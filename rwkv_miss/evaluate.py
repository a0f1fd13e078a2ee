"""How good a model is on data: its loss per token, and how often its answer is the right one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F

from rwkv_miss.config import DataOptions, EvalConfig
from rwkv_miss.data.batches import BatchStream
from rwkv_miss.data.binidx import binidx_prefix
from rwkv_miss.data.corpus import open_binidx
from rwkv_miss.data.documents import Document, all_documents, encode_record
from rwkv_miss.data.packing import check_losses, make_rows
from rwkv_miss.data.records import Record
from rwkv_miss.data.rendering import answer_text, prompt_text, without_thought
from rwkv_miss.data.sources import Source, check_sources, data_name, parse_sources, source_records
from rwkv_miss.data.templates import find_template
from rwkv_miss.data.tokenizers import Tokenizer, load_tokenizer
from rwkv_miss.errors import UserError
from rwkv_miss.generation.engine import Engine
from rwkv_miss.generation.sampling import Sampling
from rwkv_miss.model.base import RWKV
from rwkv_miss.model.log_probs import batch_log_probs
from rwkv_miss.progress import Report, no_progress

# Logits of each of two models that are compared at a time: 32 MiB in fp32, of which a few such tensors are needed.
_MAX_LOGITS = 8 * 2**20


@dataclass(frozen=True)
class Answer:
    """What a model was asked (`prompt`), the answer in the data (`expected`), and the model's (`given`)."""

    prompt: str
    expected: str
    given: str

    @property
    def is_right(self) -> bool:
        return self.given == self.expected


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
    the model learns, thoughts and white space at the ends aside.

    Args:
        max_tokens: where an answer is cut off.
        batch_size: questions that are answered together: one that has its answer is replaced by the next at once.
        report: is called now and then with the questions answered and the questions in all.

    Raises:
        UserError: a record has no question and answer, or its tokens are not those of the model.
        RunError: the model's logits are not finite.
    """
    template = find_template(options.template)
    prompts = [prompt_text(record, options) for record in records]
    # Prompts of about one length join together, so that they need little padding. The longest come first: what needs
    # most memory does not fail at the end, and the time that is left is not underestimated.
    waiting = iter(sorted(range(len(prompts)), key=lambda i: -len(prompts[i])))
    engine = Engine(model, tokenizer)
    sampling = Sampling(max_tokens=max_tokens, stop=template.stops)
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
    given = (without_thought("".join(pieces), template) for pieces in texts)
    return [
        Answer(prompt, answer_text(record, options), text)
        for prompt, record, text in zip(prompts, records, given, strict=True)
    ]


@dataclass(frozen=True)
class Evaluation:
    """What a model was found to be on data: the mean of -log p in nats over the `tokens` that carry loss, and its
    answers and how far it is from its base if they were asked for."""

    records: int
    loss: float
    tokens: int
    answers: list[Answer] | None
    forgetting: Forgetting | None = None

    def figures(self) -> dict[str, Any]:
        """The results by name, as they are written to JSON. That has neither NaN nor infinity: they become None."""
        found: dict[str, Any] = {"records": self.records, "tokens": self.tokens}
        for name, value in (("loss", self.loss), ("perplexity", perplexity(self.loss))):
            found[name] = value if math.isfinite(value) else None
        if self.answers is not None:
            right = sum(answer.is_right for answer in self.answers)
            found |= {"right": right, "exact_match": right / len(self.answers)}
        if self.forgetting is not None:
            figures = asdict(self.forgetting)
            found["forgetting"] = {name: value if math.isfinite(value) else None for name, value in figures.items()}
        return found


def evaluate(
    model: RWKV,
    config: EvalConfig,
    show: Callable[[str], AbstractContextManager[Report]] = no_progress,
    base: RWKV | None = None,
) -> Evaluation:
    """Measures a model as `config` says; `config.model` and `config.adapter` are what it was loaded from. Answers are
    not asked for where the loss is not finite.

    Args:
        show: shows how far each part is, such as `rwkv_miss.progress.show_progress`.
        base: what was loaded from `config.forgetting`, if that is given.

    Raises:
        UserError: the data cannot be read, or has no questions where answers are wanted, or the base has another
            vocabulary.
        RunError: the model's logits are not finite while it answers.
    """
    tokenizer = load_tokenizer(config.tokenizer)
    vocab_size = model.config.vocab_size
    if base is not None and base.config.vocab_size != vocab_size:
        raise UserError(
            f"{config.forgetting}: the vocabulary has {base.config.vocab_size} tokens, that of {config.model} has "
            f"{vocab_size}; give the base that the model was tuned from"
        )
    data = parse_sources(config.data, config, weights=False)
    text = [] if config.text is None else parse_sources(config.text, config, weights=False)
    check_sources([*data, *text], config)
    records, documents = _read(data, config, tokenizer, vocab_size)
    if config.exact_match and not records:
        raise UserError(f"{data_name(config.data)}: a binidx has no questions and answers; leave out exact_match")
    _, text_documents = _read(text, config, tokenizer, vocab_size) if text else ([], [])
    with show("rows of the loss") as report:
        loss, tokens = documents_loss(model, documents, config.ctx_len, config.batch_size, report)
    changed = given = None
    if base is not None:
        with show("rows of the text") as report:
            changed = forgetting(model, base, text_documents, config.ctx_len, config.batch_size, report)
    if config.exact_match and math.isfinite(loss):
        with show("answers") as report:
            given = answers(model, tokenizer, records, config, config.max_tokens, config.batch_size, report)
    return Evaluation(len(documents), loss, tokens, given, changed)


def _read(
    sources: list[Source], config: EvalConfig, tokenizer: Tokenizer, vocab_size: int
) -> tuple[list[Record], Sequence[Document]]:
    """The records of the sources and their documents; the documents alone of a binidx."""
    files = [file for source in sources for file in source.files]
    if prefix := next(filter(None, map(binidx_prefix, files)), None):
        if len(files) > 1:
            raise UserError(f"{prefix}: a binidx is among several files; measure it alone")
        return [], all_documents(open_binidx(prefix, vocab_size))[: config.limit]
    records = list(islice(source_records(sources), config.limit))
    return records, [encode_record(record, tokenizer, vocab_size, config) for record in records]
