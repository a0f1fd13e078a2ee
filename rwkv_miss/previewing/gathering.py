"""What a preview holds, gathered from records that come one by one."""

from __future__ import annotations

import statistics
from array import array
from collections import Counter
from pathlib import Path

import numpy as np

from rwkv_miss.config import PreviewConfig
from rwkv_miss.data.binidx import binidx_prefix
from rwkv_miss.data.copies import Copies
from rwkv_miss.data.documents import Document, encode_record
from rwkv_miss.data.fitting import tolerated
from rwkv_miss.data.readers.text import PACKED
from rwkv_miss.data.records import Record
from rwkv_miss.data.rendering import Span, render, unused
from rwkv_miss.data.sources import Source, data_name
from rwkv_miss.data.templates import find_template
from rwkv_miss.data.tokenizers import Tokenizer
from rwkv_miss.errors import UserError
from rwkv_miss.previewing.found import Preview, Repeated, Shown
from rwkv_miss.previewing.lengths import Fitted, histogram, lengths_to_try
from rwkv_miss.previewing.showing import show_record
from rwkv_miss.training.figures import read_figures

ANY_ID = 2**31
"""A vocabulary that every token is in: those that the model's lacks are counted, and not refused."""
# How many examples of copies are named.
_NAMED = 5


class Gathering:
    """Takes records, and tells what there is to say of all of them. Of each a few numbers are kept, and its place.

    vocabulary: the number of ids that the model has, and whose vocabulary it is. template: where the settings' template
    comes from.
    """

    def __init__(self, config: PreviewConfig, tokenizer: Tokenizer, vocabulary: tuple[int, str], template: str) -> None:
        self._config, self._tokenizer, self._vocabulary, self._chosen = config, tokenizer, vocabulary, template
        self._carry = config.long_documents == "carry"
        self._fitted = [Fitted(ctx_len, self._carry) for ctx_len in lengths_to_try(config.ctx_len)]
        self._sources: list[tuple[Source, Fitted]] = []
        self._lengths = array("q")
        self._pairs = self._conversations = self._without_loss = self._loss_tokens = 0
        self._copies = Copies()
        self._places: list[str] = []
        self._outside: Counter[int] = Counter()
        self._unread: Counter[str] = Counter()
        self._refused, self._first_refused = 0, ""
        self._shown: list[Shown] = []

    def begin(self, source: Source) -> None:
        """What is taken from now on is of this source."""
        self._sources.append((source, Fitted(self._config.ctx_len, self._carry)))

    def take_record(self, record: Record) -> None:
        """The next record. What a run would refuse is noted and left out, but for a pair of answers to compare: of that
        both conversations are taken."""
        self._unread.update([*record.unread, *unused(record, self._sources[-1][0].options)])
        try:
            self._take_conversation(record)
        except UserError as e:
            self._refused += 1
            self._first_refused = self._first_refused or str(e)
            if record.rejected:
                self._pairs += 1
                chosen = record._replace(where=f"{record.where}, chosen", rejected=())
                self._take_conversation(chosen)
                self._take_conversation(chosen._replace(where=f"{record.where}, rejected", turns=record.rejected))

    def _take_conversation(self, record: Record) -> None:
        options = self._sources[-1][0].options
        document = encode_record(record, self._tokenizer, ANY_ID, options)
        spans = render(record, options) if len(self._shown) < self._config.records else None
        self.take(record.where, spans, document)

    def take(self, where: str, spans: list[Span] | None, document: Document) -> None:
        """The next document. spans: its text, if it is known."""
        if len(self._shown) < self._config.records:
            shown = show_record(where, spans, document, self._tokenizer, self._config.ctx_len, self._carry)
            self._shown.append(shown)
        length, loss_tokens = max(len(document.ids) - 1, 0), int(np.count_nonzero(document.mask))
        self._places.append(where)
        self._lengths.append(length)
        self._loss_tokens += loss_tokens
        self._without_loss += not loss_tokens
        for fitted in (*self._fitted, self._sources[-1][1]):
            fitted.take(document, length, loss_tokens)
        given = np.flatnonzero(~document.mask[1:])
        self._conversations += len(given) > 0
        prompt = document.ids[: given[-1] + 2].tobytes() if len(given) else None
        self._copies.take(document.ids.tobytes(), prompt)
        self._outside.update(document.ids[document.ids >= self._vocabulary[0]].tolist())

    def told(self, is_all: bool) -> Preview:
        """All of it.

        Args:
            is_all: whether there is nothing after what was taken.

        Raises:
            UserError: there was nothing that a run would take.
        """
        config = self._config
        if not self._lengths:
            raise UserError(self._first_refused or f"{data_name(config.data)}: there is no record")
        ordered = sorted(self._lengths)
        enough = next((f.ctx_len for f in self._fitted if f.ctx_len >= ordered[-1]), ordered[-1])
        together = config.batch_size * config.devices * config.num_nodes
        lengths = [f.told(together) for f in self._fitted if f.ctx_len <= enough or f.ctx_len == config.ctx_len]
        rows, tokens = self._epoch(together)
        steps_an_epoch = -(-rows // (together * config.accumulate))
        steps = config.max_steps or config.epochs * steps_an_epoch
        speed = _measured_speed(config)
        return Preview(
            data=data_name(config.data),
            is_all=is_all,
            reader=self._reader(),
            template=self._template(),
            tokenizer=config.tokenizer,
            vocabulary=self._vocabulary,
            ctx_len=config.ctx_len,
            packing=config.packing,
            records=len(self._lengths),
            pairs=self._pairs,
            conversations=self._conversations,
            without_loss=self._without_loss,
            tokens=sum(self._lengths),
            loss_tokens=self._loss_tokens,
            median=ordered[len(ordered) // 2],
            most=ordered[len(ordered) - 1 - tolerated(len(ordered))],
            longest=ordered[-1],
            histogram=histogram(ordered),
            lengths=lengths,
            copies=self._repeated(self._copies.copies()),
            several_answers=self._repeated(self._copies.several_answers()),
            outside=dict(self._outside.most_common()),
            refused=self._refused,
            first_refused=self._first_refused,
            unread=dict(self._unread.most_common()),
            steps_an_epoch=steps_an_epoch,
            steps=steps,
            speed=speed,
            seconds=tokens * steps / steps_an_epoch / speed if speed and steps_an_epoch else None,
            knowledge=None,
            warnings=[],
            shown=self._shown,
        )

    def _epoch(self, rows_together: int) -> tuple[int, float]:
        """The rows and the tokens that come in an epoch: those of each source as often as its weight says."""
        rows, tokens, share = 0, 0.0, 1 - self._config.val_split
        for source, fitted in self._sources:
            told = fitted.told(rows_together)
            n = told.packed_rows if self._config.packing else told.single_rows
            rows += round(n * share * source.weight) or min(n, 1)
            tokens += told.tokens * share * source.weight
        return rows, tokens

    def _reader(self) -> tuple[str, str]:
        files = [file for source, _ in self._sources for file in source.files]
        kinds = {"binidx" if binidx_prefix(file) else _suffix(file): file for file in files}
        return ", ".join(kinds), f"by the name of {' and of '.join(file.name for file in kinds.values())}"

    def _template(self) -> tuple[str, str]:
        if not self._conversations:
            return "none", "plain text is learned as it stands"
        return find_template(self._config.template).name, self._chosen

    def _repeated(self, numbers: np.ndarray) -> Repeated:
        examples = [(self._places[later], self._places[first]) for later, first in numbers[:_NAMED].tolist()]
        return Repeated(len(numbers), examples)


def _suffix(file: Path) -> str:
    """What tells the format of a file: its suffix, with the one before if it is compressed."""
    last = file.suffix.lower()
    return (Path(file.stem).suffix.lower() * (last in PACKED) + last)[1:]


def _measured_speed(config: PreviewConfig) -> float | None:
    """Tokens per second, without padding, of a run that is in the output folder: the median of what it has written."""
    rows = read_figures(Path(config.out) / "metrics.csv")
    speeds = [float(row["tokens_per_s"]) for row in rows if row.get("tokens_per_s")]
    return statistics.median(speeds) if speeds else None
