"""A data file as rows: all of them to train on, or some of them held out for validation."""

from __future__ import annotations

from dataclasses import dataclass

from rwkv_miss.data.binidx import binidx_prefix
from rwkv_miss.data.cache import cached_store
from rwkv_miss.data.corpus import Corpus, open_binidx
from rwkv_miss.data.documents import all_documents, split_validation
from rwkv_miss.data.packing import PackReport, make_rows
from rwkv_miss.data.rows import Rows
from rwkv_miss.errors import UserError

Part = tuple[Rows, PackReport]
"""Rows, and what became of the records that they were made of."""


@dataclass(frozen=True)
class PartSettings:
    """How a file becomes rows.

    ctx_len, packing, carry and group_size are those of `make_rows`. val_split: the share of the records that is held
    out, chosen by `seed`; 0 holds none out.
    """

    corpus: Corpus
    ctx_len: int
    packing: bool
    carry: bool
    group_size: int | None
    val_split: float
    seed: int


def read_parts(settings: PartSettings) -> list[Part]:
    """The file's rows, and with a val_split those held out as a second part. A file other than a binidx is tokenised
    once for all processes (`cached_store`).

    Raises:
        UserError: as `cached_store` or `open_binidx`, `split_validation` and `make_rows`; or a binidx is to be learned
            in groups.
    """
    s, corpus = settings, settings.corpus
    if prefix := binidx_prefix(corpus.data):
        if s.group_size is not None:
            raise UserError(
                f"{prefix}: a binidx does not say which documents belong to a group; give records, such as a "
                ".jsonl file"
            )
        store = open_binidx(prefix, corpus.vocab_size, corpus.options)
    else:
        store = cached_store(corpus)
    kept, held_out = split_validation(all_documents(store), s.val_split, s.seed, s.group_size)
    parts = [kept, held_out] if s.val_split else [kept]
    return [make_rows(part, s.ctx_len, s.packing, s.carry, s.group_size) for part in parts]
