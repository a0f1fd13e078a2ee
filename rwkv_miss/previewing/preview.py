"""Reads data as a run would, and says what that run would train on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from rwkv_miss.checkpoint import read_checkpoint
from rwkv_miss.config import PreviewConfig
from rwkv_miss.data.binidx import binidx_prefix
from rwkv_miss.data.collecting import collected_warnings
from rwkv_miss.data.corpus import open_binidx
from rwkv_miss.data.documents import all_documents
from rwkv_miss.data.readers.reader import read_records
from rwkv_miss.data.sources import Source, check_sources, parse_sources
from rwkv_miss.data.tokenizers import load_tokenizer
from rwkv_miss.errors import UserError
from rwkv_miss.files import check_is_file
from rwkv_miss.model.recognise import infer_config
from rwkv_miss.previewing.found import Preview
from rwkv_miss.previewing.gathering import ANY_ID, Gathering
from rwkv_miss.previewing.knowing import ask, warn_of
from rwkv_miss.previewing.warnings import warnings_of
from rwkv_miss.training.checks import setting_problems
from rwkv_miss.training.prepare import with_adapters_settings


def preview(config: PreviewConfig, progress: Callable[[int], None] = lambda records: None) -> Preview:
    """What a run with these settings would train on.

    Args:
        progress: is called with the number of records that were read, after each.

    Raises:
        UserError: a setting is wrong, or a file cannot be read as a run would.
    """
    _check(config)
    given = config.template
    config = with_adapters_settings(config)
    tokenizer = load_tokenizer(config.tokenizer)
    sources = parse_sources(config.data, config.of_data())
    check_sources(sources, config)
    if config.base:
        vocabulary = infer_config(read_checkpoint(config.base), config.base).vocab_size, config.base
    else:
        vocabulary = tokenizer.vocab_size, f"tokenizer {config.tokenizer}"
    gathering = Gathering(config, tokenizer, vocabulary, _why(given, config))
    with collected_warnings() as of_reading:
        is_all = _read(sources, config.limit, gathering, progress)
    found = gathering.told(is_all)
    with collected_warnings():  # the warnings of reading once more
        knowledge = ask(config, sources, tokenizer) if config.ask_base else None
    return replace(found, knowledge=knowledge, warnings=[*warnings_of(found, config), *of_reading, *warn_of(knowledge)])


def _check(config: PreviewConfig) -> None:
    if wrong := setting_problems(config):
        raise UserError("; ".join(wrong))
    if config.base:
        check_is_file(Path(config.base), "checkpoint")


def _why(given: str | None, config: PreviewConfig) -> str:
    """Why records are put into the template of the settings."""
    if given is not None:
        return "it was given"
    return "the adapter was trained with it" if config.adapter_from else "it is taken where none is given"


def _read(sources: Sequence[Source], limit: int | None, gathering: Gathering, progress: Callable[[int], None]) -> bool:
    """Gathers the records, and the documents of a binidx, up to the limit. Returns whether these are all."""
    number = 0
    for source in sources:
        gathering.begin(source)
        for take in _takes(source, gathering):
            if number == limit:
                return False
            take()
            number += 1
            progress(number)
    return True


def _takes(source: Source, gathering: Gathering) -> Iterator[Callable[[], None]]:
    """For each record and each document of a source, what has it gathered."""
    for file in source.files:
        if prefix := binidx_prefix(file):
            for number, document in enumerate(all_documents(open_binidx(prefix, ANY_ID))):
                yield partial(gathering.take, f"{prefix}: document {number}", None, document)
        else:
            for record in read_records(file, source.options):
                yield partial(gathering.take_record, record)
