"""Sources as rows: all of them to train on, or some of their records held out for validation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from rwkv_miss.data.binidx import binidx_prefix
from rwkv_miss.data.cache import cached_store
from rwkv_miss.data.corpus import Corpus, open_binidx
from rwkv_miss.data.documents import Documents, all_documents, split_validation
from rwkv_miss.data.packing import PackReport, join_reports, make_rows
from rwkv_miss.data.rows import Rows, mix
from rwkv_miss.data.sources import Source
from rwkv_miss.data.store import Store
from rwkv_miss.errors import UserError


@dataclass(frozen=True)
class PartSettings:
    """How sources become rows.

    vocab_size: the number of ids that the model has. ctx_len, packing, carry and group_size are those of `make_rows`.
    val_split: the share of the records that is held out, chosen by `seed`; 0 holds none out.
    """

    tokenizer: str
    vocab_size: int
    ctx_len: int
    packing: bool
    carry: bool
    group_size: int | None
    val_split: float
    seed: int


class Part(NamedTuple):
    """Rows of one or more sources, and what became of the records of each, with the source's name."""

    rows: Rows
    reports: list[tuple[str, PackReport]]

    @property
    def report(self) -> PackReport:
        """What became of all records."""
        return join_reports([report for _, report in self.reports])


def read_parts(sources: Sequence[Source], settings: PartSettings) -> list[Part]:
    """The sources' rows, which come in an epoch as often as the sources' weights say; with a val_split those held out,
    each of which comes once, as a second part. The records of a source are packed by themselves.

    Files of records are tokenised once for all processes (`cached_store`).

    Raises:
        UserError: as `cached_store` or `open_binidx`, `split_validation` and `make_rows`; or a binidx is to be learned
            in groups.
    """
    opened = [(source, store) for source in sources for store in _stores(source, settings)]
    documents = [all_documents(store) for _, store in opened]
    kept, held_out = split_validation(documents, settings.val_split, settings.seed, settings.group_size)
    names, weights = [source.name for source, _ in opened], [source.weight for source, _ in opened]
    parts = [_part(kept, names, weights, settings)]
    if settings.val_split:
        parts.append(_part(held_out, [f"{name}, held out" for name in names], [1.0] * len(names), settings))
    return parts


def _stores(source: Source, settings: PartSettings) -> Iterator[Store]:
    """The store of the source's records, or of each binidx."""
    prefixes = [binidx_prefix(file) for file in source.files]
    if None in prefixes:
        files = tuple(map(str, source.files))
        yield cached_store(Corpus(files, settings.tokenizer, settings.vocab_size, source.options))
        return
    for prefix in filter(None, prefixes):
        if settings.group_size is not None:
            raise UserError(
                f"{prefix}: a binidx does not say which documents belong to a group; give records, such as a "
                ".jsonl file"
            )
        yield open_binidx(prefix, settings.vocab_size)


def _part(sources: Sequence[Documents], names: Sequence[str], weights: Sequence[float], settings: PartSettings) -> Part:
    s, rows, reports, of_rows = settings, [], [], []
    for documents, name, weight in zip(sources, names, weights, strict=True):
        if len(documents):
            made, report = make_rows(documents, s.ctx_len, s.packing, s.carry, s.group_size)
            rows.append(made)
            reports.append((name, report))
            of_rows.append(weight)
    return Part(mix(rows, of_rows), reports)
