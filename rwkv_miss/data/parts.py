"""A data file as rows: all of them to train on, or some of them held out for validation."""

from __future__ import annotations

from dataclasses import dataclass

from rwkv_miss.config import DataOptions
from rwkv_miss.data.corpus import read_documents
from rwkv_miss.data.documents import split_validation
from rwkv_miss.data.packing import AnyRows, PackReport, make_rows
from rwkv_miss.data.tokenizers import load_tokenizer

Part = tuple[AnyRows, PackReport]
"""Rows, and what became of the records that they were made of."""


@dataclass(frozen=True)
class PartSettings:
    """All that the rows of a file depend on, beside what is in the file and in the tokenizer's.

    data: the file. vocab_size: the number of ids that the model has. ctx_len, packing, carry and group_size are those
    of `make_rows`. val_split: the share of the records that is held out, chosen by `seed`; 0 holds none out.
    """

    data: str
    tokenizer: str
    vocab_size: int
    ctx_len: int
    packing: bool
    carry: bool
    group_size: int | None
    val_split: float
    seed: int
    options: DataOptions


def read_parts(settings: PartSettings) -> list[Part]:
    """The file's rows, and with a val_split those held out as a second part.

    Raises:
        UserError: as `read_documents`, `split_validation` and `make_rows`.
    """
    s = settings
    documents = read_documents(s.data, load_tokenizer(s.tokenizer), s.vocab_size, s.options)
    kept, held_out = split_validation(documents, s.val_split, s.seed, s.group_size)
    parts = [kept, held_out] if s.val_split else [kept]
    return [make_rows(part, s.ctx_len, s.packing, s.carry, s.group_size) for part in parts]
