"""A data file as tokens, as documents, and as a binidx."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np

from rwkv_miss.config import DataOptions
from rwkv_miss.data.binidx import binidx_prefix, read_binidx, write_binidx
from rwkv_miss.data.documents import Documents, all_documents, encode_records
from rwkv_miss.data.readers.block import Block
from rwkv_miss.data.readers.instead import instead
from rwkv_miss.data.readers.reader import READERS, Notes, block_records, check_not_empty, read_blocks
from rwkv_miss.data.store import Store, Tokens, store_in_memory
from rwkv_miss.data.tokenizers import Tokenizer, load_tokenizer
from rwkv_miss.data.workers import map_in_processes, usable_cores
from rwkv_miss.errors import UserError
from rwkv_miss.files import check_name

# A process is started for each so many bytes of a file, if there are cores: it takes half a second to start, in which
# it could tokenise 10 MB.
_BYTES_A_PROCESS = 1 << 24
# How many tokens at the beginning, at the end, and at random places of a binidx are checked when it is opened.
_SAMPLE = 4096
# Options that a binidx has no use for.
_OF_OTHER_FORMATS = ("text_field", "prompt_field", "answer_field", "separator")


@dataclass(frozen=True)
class Corpus:
    """A data file, and all that its tokens depend on beside what is in it: the tokenizer's name, the number of ids that
    the model has, and the options."""

    data: str
    tokenizer: str
    vocab_size: int
    options: DataOptions

    def tokens(self) -> Generator[Tokens]:
        """`read_tokens` of it."""
        return read_tokens(self.data, load_tokenizer(self.tokenizer), self.vocab_size, self.options)


def read_documents(path: str | Path, tokenizer: Tokenizer, vocab_size: int, options: DataOptions) -> Documents:
    """The file's records as token ids and loss masks, in memory; the documents of a binidx as they stand in it.

    Args:
        vocab_size: the number of ids that the model has.

    Raises:
        UserError: as `read_tokens`, or `open_binidx`.
    """
    if prefix := binidx_prefix(path):
        return all_documents(open_binidx(prefix, vocab_size, options))
    return all_documents(store_in_memory(str(path), read_tokens(path, tokenizer, vocab_size, options)))


def read_tokens(path: str | Path, tokenizer: Tokenizer, vocab_size: int, options: DataOptions) -> Generator[Tokens]:
    """Yields the tokens of a file's records, in order, some records at a time; ids are of `id_dtype`. A large file is
    tokenised in several processes.

    Raises:
        UserError: as `read_blocks`, `block_records` and `encode_records`, or there is no record in the file.
    """
    path = Path(path)
    size = path.stat().st_size if os.path.isfile(path) else 0
    processes = max(1, min(usable_cores(), size // _BYTES_A_PROCESS))
    encode = partial(_encode_block, tokenizer=tokenizer, vocab_size=vocab_size, options=options)
    notes = Notes()
    for found, of_block in map_in_processes(encode, read_blocks(path, options), processes):
        notes.join(of_block)
        if found is not None:
            yield found
    check_not_empty(path, notes)
    notes.warn(path)


def _encode_block(
    block: Block, tokenizer: Tokenizer, vocab_size: int, options: DataOptions
) -> tuple[Tokens | None, Notes]:
    """The tokens of a block's records, None if there are none. Raises UserError for the first record that is wrong."""
    records, notes, error = [], Notes(), None
    try:
        for record in block_records(block, options):
            notes.take(record, options)
            records.append(record)
    except UserError as e:
        error = e
    tokens = encode_records(records, tokenizer, vocab_size, options) if records else None
    if error is not None:
        raise error  # after those of the records before
    return tokens and tokens._replace(ids=tokens.ids.astype(id_dtype(tokenizer))), notes


def id_dtype(tokenizer: Tokenizer) -> type[np.integer]:
    """uint16 if the tokenizer's ids fit, otherwise int32."""
    return np.uint16 if tokenizer.vocab_size <= 2**16 else np.int32


def open_binidx(prefix: str | Path, vocab_size: int, options: DataOptions) -> Store:
    """PREFIX.bin and PREFIX.idx as a store for a model of `vocab_size` ids. Documents are taken as they stand: one that
    lacks an `END` is not given one. All tokens but the first of each carry loss.

    The first, the last and some random tokens are looked at here, all the others when they are used.

    Raises:
        UserError: a token is not in the vocabulary (the message names its document), the pair cannot be read, or
            `options` name fields or a separator, of which a binidx has none.
    """
    if any(getattr(options, name) != getattr(DataOptions(), name) for name in _OF_OTHER_FORMATS):
        raise UserError(f"{prefix}: a binidx has no fields; leave out {', '.join(_OF_OTHER_FORMATS)}")
    file = read_binidx(prefix)
    has_targets = np.diff(file.offsets) > 1
    edges = np.stack([file.offsets[:-1] + 1, file.offsets[1:]], axis=1)[has_targets].ravel()
    store = Store(f"{prefix}.bin", file.tokens, file.offsets, edges, vocab_size=vocab_size)
    n = len(file.tokens)
    anywhere = np.random.Generator(np.random.PCG64(0)).integers(n, size=_SAMPLE)
    places = np.unique(np.r_[0 : min(n, _SAMPLE), max(n - _SAMPLE, 0) : n, anywhere])
    store.check(file.tokens[places], places)
    return store


def check_source(path: str | Path) -> None:
    """Raises UserError if `path` is missing or of a kind that `read_documents` does not read. Does not open it."""
    check_name(Path(path), "data")
    if binidx_prefix(path) is not None:
        return
    if said := instead(Path(path), [*READERS]):
        raise UserError(f"{path}: {said}")
    if not Path(path).exists():
        raise UserError(f"{path}: no such file (data)")


@dataclass(frozen=True)
class Written:
    """What a binidx was made of; `with_prompts` counts the documents that are not plain text."""

    documents: int
    tokens: int
    with_prompts: int


def records_to_binidx(path: str | Path, prefix: str, tokenizer: Tokenizer, options: DataOptions) -> Written:
    """Writes the records of a data file as PREFIX.bin and PREFIX.idx, with ids of `id_dtype`. The loss masks are lost,
    since a binidx has no place for them.

    Raises:
        UserError: as `read_tokens`, or the pair cannot be written or is there already. Nothing is left then.
    """
    check_name(Path(f"{prefix}.bin"), "a binidx")
    if prefix.endswith((".bin", ".idx")) or prefix.rpartition("/")[2] in ("", ".", ".."):
        raise UserError(f"out is {prefix!r}; give what comes before .bin and .idx in the names of the files to write")
    for file in (f"{prefix}.bin", f"{prefix}.idx"):
        if Path(file).exists():
            raise UserError(f"{file}: exists already; give another out, or remove it first")
    documents = with_prompts = 0

    def ids() -> Iterator[np.ndarray]:
        nonlocal documents, with_prompts
        for tokens in read_tokens(path, tokenizer, tokenizer.vocab_size, options):
            some = all_documents(store_in_memory(str(path), [tokens]))
            documents += len(some)
            with_prompts += int(np.count_nonzero(some.learned < some.targets))
            yield from np.split(tokens.ids, some.stops[:-1])

    read = ids()
    first = next(read)  # before the output's folder is made: data that cannot be read leave nothing
    tokens = write_binidx(prefix, chain([first], read), id_dtype(tokenizer))
    return Written(documents, tokens, with_prompts)
