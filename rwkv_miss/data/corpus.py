"""A data file as documents, and as a binidx."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np

from rwkv_miss.config import Data, DataOptions
from rwkv_miss.data.binidx import binidx_prefix, write_binidx
from rwkv_miss.data.documents import Document, encode_record
from rwkv_miss.data.mapped import open_documents
from rwkv_miss.data.readers.reader import read_records
from rwkv_miss.data.sources import check_sources, parse_sources, source_records
from rwkv_miss.data.tokenizers import Tokenizer
from rwkv_miss.errors import UserError
from rwkv_miss.files import check_name


def read_documents(path: str | Path, tokenizer: Tokenizer, vocab_size: int, options: DataOptions) -> Sequence[Document]:
    """The file's records as token ids and loss masks; the documents of a binidx as they stand in it.

    Args:
        vocab_size: the number of ids that the model has.

    Raises:
        UserError: as `read_records` and `encode_record`, or `open_documents`.
    """
    if prefix := binidx_prefix(path):
        return open_documents(prefix, vocab_size, options)
    return [encode_record(record, tokenizer, vocab_size, options) for record in read_records(path, options)]


@dataclass(frozen=True)
class Written:
    """What a binidx was made of; `with_prompts` counts the documents that are not plain text."""

    documents: int
    tokens: int
    with_prompts: int


def records_to_binidx(data: Data, prefix: str, tokenizer: Tokenizer, options: DataOptions) -> Written:
    """Writes the records of all sources as PREFIX.bin and PREFIX.idx: as uint16 if the tokenizer's ids fit, otherwise
    as int32. The loss masks are lost, since a binidx has no place for them.

    Raises:
        UserError: as `parse_sources`, `check_sources`, `source_records` and `encode_record`, or the pair cannot be
            written or is there already. Nothing is left then.
    """
    check_name(Path(f"{prefix}.bin"), "a binidx")
    if prefix.endswith((".bin", ".idx")) or prefix.rpartition("/")[2] in ("", ".", ".."):
        raise UserError(f"out is {prefix!r}; give what comes before .bin and .idx in the names of the files to write")
    for file in (f"{prefix}.bin", f"{prefix}.idx"):
        if Path(file).exists():
            raise UserError(f"{file}: exists already; give another out, or remove it first")
    sources = parse_sources(data, options, weights=False)
    check_sources(sources, options)
    documents = with_prompts = 0

    def ids() -> Iterator[np.ndarray]:
        nonlocal documents, with_prompts
        for record in source_records(sources):
            documents += 1
            with_prompts += not record.is_text
            yield encode_record(record, tokenizer, tokenizer.vocab_size, options).ids

    read = ids()
    first = next(read)  # before the output's folder is made: data that cannot be read leave nothing
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.int32
    tokens = write_binidx(prefix, chain([first], read), dtype)
    return Written(documents, tokens, with_prompts)
