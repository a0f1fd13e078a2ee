"""Sample answers: what the model says in the middle of its training."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from rwkv_miss.data.documents import Document
from rwkv_miss.data.tokenizers import Tokenizer
from rwkv_miss.files import atomic_write
from rwkv_miss.generation.engine import Engine
from rwkv_miss.generation.sampling import Sampling
from rwkv_miss.model.base import RWKV
from rwkv_miss.training.appended import AppendedFile
from rwkv_miss.training.figures import read_samples
from rwkv_miss.training.reporting import Reporter

# Of plain text the model is given this many tokens, or half of the document if that is less.
_TEXT_PROMPT = 32


@dataclass(frozen=True)
class Sample:
    """A model's likeliest `answer` to a `prompt` at an optimizer step, and what the data has there (`expected`)."""

    step: int
    prompt: str
    expected: str
    answer: str


def split_document(document: Document) -> tuple[np.ndarray, np.ndarray]:
    """The ids up to the last answer, and the rest; of plain text its beginning, and the rest."""
    last_given = np.flatnonzero(~document.mask)[-1]  # of plain text the first token
    at = min(_TEXT_PROMPT, len(document.ids) // 2) if document.is_text else last_given + 1
    return document.ids[:at], document.ids[at:]


def ask(
    model: RWKV, tokenizer: Tokenizer, documents: Sequence[Document], max_tokens: int, stop: tuple[str, ...], step: int
) -> list[Sample]:
    """A sample of each document; `stop` are the strings that end an answer. In a run of several processes all of them
    call this, with the same documents.

    Raises:
        RunError: the model's logits are not finite.
    """
    parts = [split_document(document) for document in documents]
    answers = [""] * len(documents)
    with _asked(model):
        engine = Engine(model, tokenizer)
        for document, (prompt, _) in zip(documents, parts, strict=True):
            ends = () if document.is_text else stop
            engine.add(prompt.tolist(), Sampling(max_tokens=max_tokens, stop=ends))
        for piece in engine:
            answers[piece.member] += piece.text
    texts = [tokenizer.decode(prompt.tolist()) for prompt, _ in parts]
    expected = [tokenizer.decode(rest[:max_tokens].tolist()) for _, rest in parts]
    return [Sample(step, *found) for found in zip(texts, expected, answers, strict=True)]


@contextmanager
def _asked(model: RWKV) -> Iterator[None]:
    """A context without dropout, in which every process sees the first one's logits: one that chose another token for
    the rounding of its sums would end sooner or later than the others, and under ZeRO-3 each forward needs all."""
    training = model.training
    hook = model.register_forward_hook(_first_ranks) if dist.is_initialized() else None
    model.eval()
    try:
        yield
    finally:
        model.train(training)
        if hook:
            hook.remove()


def _first_ranks(model: Any, arguments: Any, output: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
    logits = output[0][:, -1:].float().contiguous()  # all that is read of them
    dist.broadcast(logits, 0)
    return logits, output[1]


class Sampler(L.Callback):
    """Asks for samples before the first optimizer step, every `every` steps and after the last one, shows them, and
    appends them to `out`/samples.jsonl, from which the samples of steps that are done again are removed first."""

    def __init__(
        self,
        model: RWKV,
        tokenizer: Tokenizer,
        documents: Sequence[Document],
        max_tokens: int,
        stop: tuple[str, ...],
        out: Path,
        every: int,
        total_steps: int,
        reporter: Reporter,
    ) -> None:
        self.model, self.tokenizer, self.documents = model, tokenizer, documents
        self.max_tokens, self.stop = max_tokens, stop
        self.path, self.every, self.total_steps = out / "samples.jsonl", every, total_steps
        self.reporter = reporter

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            step = trainer.global_step
            kept = [row for row in read_samples(self.path) if row["step"] <= step] if step else []
            with atomic_write(self.path) as part:
                part.write_bytes(b"".join(map(_line, kept)))
            self._file = AppendedFile(self.path)
        if trainer.global_step == 0:
            self._sample(trainer)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0 and (
            step % self.every == 0 or step == self.total_steps
        ):
            self._sample(trainer)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if trainer.is_global_zero:
            self._file.close()

    def _sample(self, trainer: L.Trainer) -> None:
        step, begin = trainer.global_step, time.monotonic()
        samples: list[Sample] = []

        def work() -> None:
            samples.extend(ask(self.model, self.tokenizer, self.documents, self.max_tokens, self.stop, step))

        with torch.no_grad():
            trainer.strategy.predict_step(work)
        if trainer.is_global_zero:
            self._show(trainer, samples)
        self.reporter.leave_out(time.monotonic() - begin)

    def _show(self, trainer: L.Trainer, samples: list[Sample]) -> None:
        self._file.write(b"".join(_line(asdict(sample)) for sample in samples))
        for sample in samples:
            self.reporter.display.sample(sample.step, sample.prompt, sample.answer, sample.expected)
        rows = [[sample.prompt, sample.answer, sample.expected] for sample in samples]
        for logger in trainer.loggers:
            if log_text := getattr(logger, "log_text", None):
                log_text("samples", columns=["prompt", "answer", "expected"], data=rows, step=trainer.global_step)


def _line(row: dict[str, Any]) -> bytes:
    return (json.dumps(row, ensure_ascii=False) + "\n").encode()
