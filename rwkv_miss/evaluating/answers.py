"""What a model answers: the questions of records put to it, and what it writes compared with the data's answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice

from rwkv_miss.config import DataOptions
from rwkv_miss.data.records import Record
from rwkv_miss.data.rendering import answer_text, prompt_text, without_thought
from rwkv_miss.data.templates import find_template
from rwkv_miss.data.tokenizers import Tokenizer
from rwkv_miss.errors import UserError
from rwkv_miss.evaluating.answer import Answer
from rwkv_miss.evaluating.extractors import Extractor, whole
from rwkv_miss.generation.engine import Engine
from rwkv_miss.generation.sampling import Sampling, mixed_seed
from rwkv_miss.model.base import RWKV
from rwkv_miss.progress import Report


def answers(
    model: RWKV,
    tokenizer: Tokenizer,
    records: Sequence[Record],
    options: DataOptions,
    sampling: Sampling,
    batch_size: int,
    samples: int = 1,
    extractor: Extractor | None = None,
    report: Report | None = None,
) -> list[Answer]:
    """The model's answers to each record's last question, `samples` to each, in the order of the records. Right means
    equal to the answer in the form that the model learns, thoughts and white space at the ends aside.

    Args:
        sampling: how they are drawn and where they are cut off. Stop strings are those of the template, and seeds are
            made of its seed, the record's number and the answer's, so that no answer depends on the others.
        batch_size: questions that are answered together.
        extractor: finds what is compared; None compares whole answers.
        report: is called now and then with the questions answered and the questions in all.

    Raises:
        UserError: a record has no question and answer, nothing to compare is found in its answer, or its tokens are not
            those of the model.
        RunError: the model's logits are not finite.
    """
    template = find_template(options.template)
    extractor = extractor or Extractor(whole)
    expected = [wanted(record, options, extractor) for record in records]
    places = [(i, sample) for i in range(len(records)) for sample in range(samples)]
    prompts = [prompt_text(record, options) for record in records]
    samplings = [replace(sampling, stop=template.stops, seed=mixed_seed(sampling.seed, *place)) for place in places]
    texts = write(model, tokenizer, [prompts[i] for i, _ in places], samplings, batch_size, report)
    found = []
    for (i, sample), text in zip(places, texts, strict=True):
        given = without_thought(text, template)
        value = extractor.find(given)
        text, right = expected[i]
        found.append(Answer(records[i].where, prompts[i], text, given, value == right, sample, value))
    return found


def write(
    model: RWKV,
    tokenizer: Tokenizer,
    prompts: Sequence[str] | Sequence[list[int]],
    samplings: Sequence[Sampling],
    batch_size: int,
    report: Report | None = None,
) -> list[str]:
    """What the model writes after each prompt (a text, or its token ids), which has a sampling of its own.

    Of `batch_size` prompts that are answered together, one that has its answer is replaced by the next at once.
    `report` and errors are those of `answers`.
    """
    # Prompts of about one length join together, so that they need little padding. The longest come first: what needs
    # most memory does not fail at the end, and the time that is left is not underestimated.
    waiting = iter(sorted(range(len(prompts)), key=lambda i: -len(prompts[i])))
    engine = Engine(model, tokenizer)
    index: dict[int, int] = {}  # of a member's prompt
    texts: list[list[str]] = [[] for _ in prompts]
    n_answered = 0

    def ask() -> None:
        for i in islice(waiting, batch_size - len(engine)):
            index[engine.add(prompts[i], samplings[i])] = i

    ask()
    for piece in engine:
        texts[index[piece.member]].append(piece.text)
        if piece.finish:
            n_answered += 1
            ask()
        if report:
            report(n_answered, len(prompts))
    return ["".join(pieces) for pieces in texts]


def wanted(record: Record, options: DataOptions, extractor: Extractor) -> tuple[str, str]:
    """The data's answer, and what is compared of it.

    Raises:
        UserError: the record has no question and answer, or nothing to compare is found in its answer.
    """
    expected = answer_text(record, options)
    value = extractor.find(expected)
    if value is None and not extractor.may_be_whole:
        raise UserError(
            f"{record.where}: extract finds nothing in the answer {expected[-40:]!r}; give another one, or "
            "correct the record"
        )
    return expected, expected if value is None else value
