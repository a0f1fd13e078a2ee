"""Reads data as a run would, and says what that run would train on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path

from rwkv_miss.adapters import method
from rwkv_miss.checkpoint import read_checkpoint
from rwkv_miss.config import PreviewConfig, value_problems
from rwkv_miss.data.binidx import binidx_prefix
from rwkv_miss.data.corpus import check_source
from rwkv_miss.data.mapped import open_documents
from rwkv_miss.data.readers.reader import read_records
from rwkv_miss.data.tokenizers import load_tokenizer
from rwkv_miss.errors import UserError
from rwkv_miss.files import check_is_file
from rwkv_miss.model.recognise import infer_config
from rwkv_miss.previewing.found import Preview
from rwkv_miss.previewing.gathering import ANY_ID, Gathering
from rwkv_miss.previewing.knowing import ask, warn_of
from rwkv_miss.previewing.warnings import warnings_of
from rwkv_miss.training.prepare import with_adapters_settings

_log = logging.getLogger("rwkv_miss")


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
    if config.base:
        vocabulary = infer_config(read_checkpoint(config.base), config.base).vocab_size, config.base
    else:
        vocabulary = tokenizer.vocab_size, f"tokenizer {config.tokenizer}"
    gathering = Gathering(config, tokenizer, vocabulary, _why(given, config))
    with _collected() as of_reading:
        is_all = _read(config, gathering, progress)
    found = gathering.told(is_all)
    knowledge = ask(config, tokenizer) if config.ask_base else None
    return replace(found, knowledge=knowledge, warnings=[*warnings_of(found, config), *of_reading, *warn_of(knowledge)])


def _check(config: PreviewConfig) -> None:
    if wrong := value_problems(config) + value_problems(config.adapter, "adapter."):
        raise UserError("; ".join(wrong))
    wrong = config.problems() + config.adapter.problems()
    if wrong := wrong + method.problems(config.adapter, None if config.adapter_from else config):
        raise UserError("; ".join(wrong))
    check_source(config.data)
    if config.base:
        check_is_file(Path(config.base), "checkpoint")


def _why(given: str | None, config: PreviewConfig) -> str:
    """Why records are put into the template of the settings."""
    if given is not None:
        return "it was given"
    return "the adapter was trained with it" if config.adapter_from else "it is taken where none is given"


@contextmanager
def _collected() -> Iterator[list[str]]:
    """Collects the warnings that the package gives, in the place of showing them."""
    found: list[str] = []

    def passes(record: logging.LogRecord) -> bool:
        if record.levelno == logging.WARNING:
            found.append(record.getMessage())
        return record.levelno != logging.WARNING

    _log.addFilter(passes)
    try:
        yield found
    finally:
        _log.removeFilter(passes)


def _read(config: PreviewConfig, gathering: Gathering, progress: Callable[[int], None]) -> bool:
    """Gathers the records, or the documents of a binidx, up to the limit. Returns whether these are all."""
    if prefix := binidx_prefix(config.data):
        documents = open_documents(prefix, ANY_ID, config)
        for number, document in enumerate(documents[: config.limit]):
            gathering.take(f"document {number}", None, document)
            progress(number + 1)
        return config.limit is None or config.limit >= len(documents)
    records = read_records(config.data, config)
    for number, record in enumerate(islice(records, config.limit)):
        gathering.take_record(record)
        progress(number + 1)
    return config.limit is None or next(records, None) is None
