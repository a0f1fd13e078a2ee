"""Whether a base knows the template that records are put into."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import islice

import torch
import torch.nn.functional as F

from rwkv_miss.config import PreviewConfig
from rwkv_miss.data.binidx import binidx_prefix
from rwkv_miss.data.records import Record
from rwkv_miss.data.rendering import render
from rwkv_miss.data.sources import Source, source_records
from rwkv_miss.data.tokenizers import Tokenizer
from rwkv_miss.errors import UserError
from rwkv_miss.generation.text_stream import Detokenizer
from rwkv_miss.model.base import RWKV
from rwkv_miss.model.load import load_model
from rwkv_miss.previewing.found import Knowledge

# The records that are read, and how many tokens of each: 4,096 in all, a third of what a small optimizer step computes.
_RECORDS, _TOKENS = 16, 256
# A string that is the same in every record costs a base that has learned it a few hundredths of a nat a token, whatever
# the text costs; one that has never seen it pays about what text costs, or more. Half is between them.
_KNOWN = 0.5
# Put around what is the record's own, so that what the template adds is found. Unicode keeps these two for a program's
# own use: no text has them.
_OPEN, _CLOSE = "\ufdd2", "\ufdd3"


def ask(config: PreviewConfig, sources: Sequence[Source], tokenizer: Tokenizer) -> Knowledge | None:
    """Lets the base of the settings read the first conversations of their data, those aside in which tools are called.
    None if there are none.

    Raises:
        UserError: the base cannot be loaded.
    """
    with_records = [source for source in sources if not binidx_prefix(source.files[0])]
    records = (record for record in source_records(with_records) if not record.is_text and not record.tools)
    texts = []
    for record in islice(records, _RECORDS):
        with suppress(UserError):  # the template has no form for it, which is told elsewhere
            texts.append(own_strings(record, config))
    if not texts:
        return None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = None if config.precision == "auto" else config.precision
    model = load_model(config.base, dtype, device, quant=config.quant, quant_skip=config.quant_skip).eval()
    return knowledge(model, tokenizer, texts)


def warn_of(found: Knowledge | None) -> Iterator[str]:
    """A sentence, if the base does not know the template."""
    if found and found.own > _KNOWN * found.text:
        yield (
            f"the base does not seem to know the template: its loss on the template's own strings is {found.own:.2f} a "
            f"token, on the text around them {found.text:.2f}; choose the template that it was trained with, or else "
            "count on more data and steps, in which it learns to read this one"
        )


Stretches = list[tuple[str, bool | None]]
"""A text in parts, each with whether it is the template's own; None for a part that is not to be counted."""


def own_strings(record: Record, config: PreviewConfig) -> list[Stretches]:
    """The spans of a record's first question and answer. The string that the text begins with is not to be counted."""
    first = next(i for i, turn in enumerate(record.turns) if turn.role == "assistant")
    turns = tuple(
        turn._replace(content=_marked(turn.content), input=_marked(turn.input), thought=_marked(turn.thought))
        for turn in record.turns[: first + 1]
    )
    found: list[Stretches] = []
    for span in render(record._replace(turns=turns), config):
        parts = re.split(f"{_OPEN}(.*?){_CLOSE}", span.text, flags=re.DOTALL)
        found.append([(part, i % 2 == 0 if i or found else None) for i, part in enumerate(parts) if part])
    return found


def _marked(text: str) -> str:
    return text and f"{_OPEN}{text.strip()}{_CLOSE}"


@torch.no_grad()
def knowledge(model: RWKV, tokenizer: Tokenizer, texts: Iterable[list[Stretches]]) -> Knowledge:
    """The model's loss on the template's own strings and on the text around them, over the first tokens of each text.

    Of a string of the template the first token does not count, since no model can know where a question ends.
    """
    sums, counts = [0.0, 0.0], [0, 0]
    for spans in texts:
        ids: list[int] = []
        kinds: list[bool | None] = []
        for span in spans:
            of_span = tokenizer.encode("".join(part for part, _ in span))
            kinds += _kinds(span, tokenizer, of_span)
            ids += of_span
        tokens = torch.tensor([ids[:_TOKENS]], device=model.emb.weight.device)
        logits, _ = model(tokens)
        losses = F.cross_entropy(logits[0, :-1].float(), tokens[0, 1:], reduction="none")
        for kind, loss in zip(kinds[1:], losses.tolist(), strict=False):
            if kind is not None:
                sums[kind] += loss
                counts[kind] += 1
    return Knowledge(sums[1] / max(counts[1], 1), counts[1], sums[0] / max(counts[0], 1), counts[0])


def _kinds(stretches: Stretches, tokenizer: Tokenizer, ids: list[int]) -> list[bool | None]:
    """Of each token, whether it is the template's own. None, which does not count, for the first token of a string of
    the template and for one that belongs to more than one stretch or to a part of a character."""
    owners = [(number, is_own) for number, (part, is_own) in enumerate(stretches) for _ in part]
    stream, begin = Detokenizer(tokenizer), 0
    kinds: list[bool | None] = []
    for token in ids:
        stop = begin + len(stream.push(token))
        of_token = owners[begin:stop]
        is_first = bool(of_token) and (begin == 0 or owners[begin - 1] != of_token[0])
        is_whole = len(set(of_token)) == 1
        kinds.append(of_token[0][1] if is_whole and not (is_first and of_token[0][1]) else None)
        begin = stop
    return kinds
