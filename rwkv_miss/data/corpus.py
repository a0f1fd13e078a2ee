"""Data files as tokens, and as a binidx; a binidx as tokens."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np

from rwkv_miss.config import Data, DataOptions
from rwkv_miss.data.ahead import ahead
from rwkv_miss.data.binidx import read_binidx, write_binidx
from rwkv_miss.data.documents import all_documents, encode_records
from rwkv_miss.data.readers.block import Block
from rwkv_miss.data.readers.reader import Notes, block_records, check_not_empty, read_blocks
from rwkv_miss.data.records import Record
from rwkv_miss.data.sources import check_sources, parse_sources, refuse_binidx
from rwkv_miss.data.store import Store, Tokens, store_in_memory
from rwkv_miss.data.tokenizers import Tokenizer, load_tokenizer
from rwkv_miss.data.workers import map_in_processes, usable_cores
from rwkv_miss.errors import UserError
from rwkv_miss.files import check_name

# A process is started for each so many bytes of the files, if there are cores: it takes half a second to start, in
# which it could tokenise 10 MB.
_BYTES_A_PROCESS = 1 << 24
# How many tokens at the beginning, at the end, and at random places of a binidx are checked when it is opened.
_SAMPLE = 4096


@dataclass(frozen=True)
class Corpus:
    """Files of records, and all that their tokens depend on beside what is in them.

    tokenizer: its name. vocab_size: the number of ids that the model has.
    """

    files: tuple[str, ...]
    tokenizer: str
    vocab_size: int
    options: DataOptions

    @property
    def name(self) -> str:
        """What messages call all of it."""
        return self.files[0] + (f" and {len(self.files) - 1:,} more" if len(self.files) > 1 else "")


def read_tokens(corpus: Corpus, cores: int | None = None) -> Generator[Tokens]:
    """Yields the tokens of all records, in order, some records at a time. At the end `Notes` warns of each file.

    Args:
        cores: large files are tokenised in up to so many processes; None means `usable_cores`.

    Raises:
        UserError: as `read_blocks`, `block_records` and `encode_records`, or a file has no record.
    """
    files = [Path(file) for file in corpus.files]
    size = sum(os.path.getsize(file) for file in files if os.path.isfile(file))
    processes = min(cores or usable_cores(), size // _BYTES_A_PROCESS)
    blocks = chain.from_iterable(read_blocks(file, corpus.options) for file in files)
    encode = partial(
        _encode,
        tokenizer=load_tokenizer(corpus.tokenizer),
        vocab_size=corpus.vocab_size,
        options=corpus.options,
    )
    notes = {file: Notes() for file in files}
    for tokens, file, of_block in map_in_processes(encode, blocks, processes):
        notes[file].join(of_block)
        if len(tokens.lengths):
            yield tokens
    for file in files:
        check_not_empty(file, notes[file])
        notes[file].warn(file)


def _encode(block: Block, tokenizer: Tokenizer, vocab_size: int, options: DataOptions) -> tuple[Tokens, Path, Notes]:
    """The tokens of a block's records, its file, and what is to be noted of it. Raises UserError for the first record
    that is wrong."""
    notes, error = Notes(), None

    def records() -> Iterator[Record]:
        nonlocal error
        try:
            for record in ahead(block_records(block, options)):
                notes.take(record, options)
                yield record
        except UserError as e:
            error = e

    tokens = encode_records(records(), tokenizer, vocab_size, options)
    if error is not None:
        raise error  # after those of the records before it
    return tokens._replace(ids=tokens.ids.astype(id_dtype(tokenizer))), block.path, notes


def id_dtype(tokenizer: Tokenizer) -> type[np.integer]:
    """uint16 if all ids of the tokenizer fit, otherwise int32."""
    return np.uint16 if tokenizer.vocab_size <= 2**16 else np.int32


def open_binidx(prefix: str | Path, vocab_size: int) -> Store:
    """PREFIX.bin and PREFIX.idx as a store for a model of `vocab_size` ids. Documents are taken as they stand: one that
    lacks an `END` is not given one. All tokens but the first of each carry loss.

    The first, the last and some random tokens are looked at here, all the others when they are used.

    Raises:
        UserError: a token is not in the vocabulary (the message names its document), or the pair cannot be read.
    """
    file = read_binidx(prefix)
    n = len(file.tokens)
    store = Store(f"{prefix}.bin", file.tokens, file.offsets, np.array([0, n]), vocab_size=vocab_size)
    anywhere = np.random.Generator(np.random.PCG64(0)).integers(n, size=_SAMPLE)
    places = np.unique(np.r_[0 : min(n, _SAMPLE), max(n - _SAMPLE, 0) : n, anywhere])
    store.check(file.tokens[places], places)
    return store


@dataclass(frozen=True)
class Written:
    """What a binidx was made of; `with_prompts` counts the documents that are not plain text."""

    documents: int
    tokens: int
    with_prompts: int


def records_to_binidx(data: Data, prefix: str, tokenizer: Tokenizer, options: DataOptions) -> Written:
    """Writes the records of all sources as PREFIX.bin and PREFIX.idx, with ids of `id_dtype`. The loss masks are lost,
    since a binidx has no place for them.

    Raises:
        UserError: as `parse_sources`, `check_sources`, `refuse_binidx` and `read_tokens`, or the pair cannot be written
            or is there already. Nothing is left then.
    """
    check_name(Path(f"{prefix}.bin"), "a binidx")
    if prefix.endswith((".bin", ".idx")) or prefix.rpartition("/")[2] in ("", ".", ".."):
        raise UserError(f"out is {prefix!r}; give what comes before .bin and .idx in the names of the files to write")
    for file in (f"{prefix}.bin", f"{prefix}.idx"):
        if Path(file).exists():
            raise UserError(f"{file}: exists already; give another out, or remove it first")
    sources = parse_sources(data, options, weights=False)
    check_sources(sources, options)
    refuse_binidx(sources)
    corpora = [
        Corpus(tuple(map(str, source.files)), tokenizer.name, tokenizer.vocab_size, source.options)
        for source in sources
    ]
    documents = with_prompts = 0

    def ids() -> Iterator[np.ndarray]:
        nonlocal documents, with_prompts
        for tokens in chain.from_iterable(map(read_tokens, corpora)):
            some = all_documents(store_in_memory(prefix, [tokens]))
            documents += len(some)
            with_prompts += int(np.count_nonzero(some.learned < some.targets))
            yield from np.split(tokens.ids, some.stops[:-1])

    read = ids()
    first = next(read)  # before the output's folder is made: data that cannot be read leave nothing
    n_tokens = write_binidx(prefix, chain([first], read), id_dtype(tokenizer))
    return Written(documents, n_tokens, with_prompts)
