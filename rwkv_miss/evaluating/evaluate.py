"""A model measured on data: what `rwkv-miss eval` says."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any

from rwkv_miss.config import EvalConfig
from rwkv_miss.data.binidx import binidx_prefix
from rwkv_miss.data.corpus import open_binidx
from rwkv_miss.data.documents import Document, all_documents, check_ids, encode_record
from rwkv_miss.data.records import Record
from rwkv_miss.data.sources import Source, check_sources, data_name, parse_sources, source_records
from rwkv_miss.data.tokenizers import END, Tokenizer, load_tokenizer
from rwkv_miss.errors import UserError
from rwkv_miss.evaluating.answer import Answer
from rwkv_miss.evaluating.answers import answers, wanted
from rwkv_miss.evaluating.likelihood import likelihoods
from rwkv_miss.evaluating.losses import Forgetting, documents_loss, forgetting
from rwkv_miss.evaluating.rates import perplexity
from rwkv_miss.evaluating.scoring import JUDGES, Judge, figures, find_extractor
from rwkv_miss.generation.sampling import Sampling
from rwkv_miss.model.base import RWKV
from rwkv_miss.progress import Report, no_progress


@dataclass(frozen=True)
class Evaluation:
    """What a model was found to be on data: the mean of -log p in nats over the `tokens` that carry loss, and its
    answers with their figures (`rwkv_miss.evaluating.scoring`) and how far it is from its base if they were asked
    for."""

    records: int
    loss: float
    tokens: int
    answers: list[Answer] | None
    scores: dict[str, Any] | None = None
    forgetting: Forgetting | None = None

    def figures(self) -> dict[str, Any]:
        """The results by name, as they are written to JSON. That has neither NaN nor infinity: they become None."""
        found: dict[str, Any] = {"records": self.records, "tokens": self.tokens}
        for name, value in (("loss", self.loss), ("perplexity", perplexity(self.loss))):
            found[name] = value if math.isfinite(value) else None
        found |= self.scores or {}
        if self.forgetting is not None:
            found["forgetting"] = {
                name: value if math.isfinite(value) else None for name, value in asdict(self.forgetting).items()
            }
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
    # Choices are a field of data; where the user has not named it, it is no option of theirs that data may not know.
    reading = replace(config, choices_field=config.choices_field or "choices") if config.extract == "choice" else config
    data = parse_sources(config.data, reading, weights=False)
    text = [] if config.text is None else parse_sources(config.text, config, weights=False)
    check_sources([*data, *text], config)
    records, documents = _read(data, config, tokenizer, vocab_size)
    asks = config.exact_match or config.extract is not None
    if asks and not records:
        option = "exact_match" if config.exact_match else "extract"
        raise UserError(f"{data_name(config.data)}: a binidx has no questions and answers; leave out {option}")
    _, text_documents = _read(text, config, tokenizer, vocab_size) if text else ([], [])
    judge = JUDGES.get(config.extract or "")
    extractor = find_extractor(config.extract) if asks and not judge else None
    # What is wrong with a record is told before the loss of all is computed.
    texts = [judge.texts(record, config) for record in records] if judge else []
    if extractor:
        for record in records:
            wanted(record, config, extractor)
    with show("rows of the loss") as report:
        loss, tokens = documents_loss(model, documents, config.ctx_len, config.batch_size, report)
    changed = given = scores = None
    if base is not None:
        with show("rows of the text") as report:
            changed = forgetting(model, base, text_documents, config.ctx_len, config.batch_size, report)
    if asks and math.isfinite(loss):
        with show("answers") as report:
            if judge:
                given = _judged(model, tokenizer, judge, records, texts, config, report)
            else:
                sampling = Sampling(config.temperature, config.top_p, config.max_tokens, seed=config.seed)
                how = (sampling, config.batch_size, config.samples, extractor)
                given = answers(model, tokenizer, records, config, *how, report)
        scores = figures(given, config)
    return Evaluation(len(documents), loss, tokens, given, scores, changed)


def _judged(
    model: RWKV,
    tokenizer: Tokenizer,
    judge: Judge,
    records: Sequence[Record],
    texts: Sequence[list[tuple[str, str]]],
    config: EvalConfig,
    report: Report,
) -> list[Answer]:
    """The answers of a model that writes nothing. `texts` are each record's."""
    lead = [END] if config.lead_token else []
    pairs = []
    for record, of_record in zip(records, texts, strict=True):
        for prompt, text in of_record:
            ids = tokenizer.encode(prompt), tokenizer.encode(text)
            check_ids(record.where, [*ids[0], *ids[1]], tokenizer, model.config.vocab_size)
            pairs.append((lead + ids[0], ids[1]))
    found = iter(likelihoods(model, pairs, config.batch_size, report))
    return [
        judge.answer(record, of_record, list(islice(found, len(of_record))))
        for record, of_record in zip(records, texts, strict=True)
    ]


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
