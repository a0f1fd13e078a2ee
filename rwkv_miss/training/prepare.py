"""What a run trains on and what it trains, found from the data and from the base's keys and shapes: every check that
needs no model is made here, before the base's weights are loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from rwkv_miss.adapters.plan import make_plan
from rwkv_miss.checkpoint import read_checkpoint
from rwkv_miss.config import ModelConfig, TrainConfig
from rwkv_miss.data.batches import count_windows
from rwkv_miss.data.corpus import read_documents
from rwkv_miss.data.documents import Document, split_validation
from rwkv_miss.data.packing import AnyRows, PackReport, check_losses, make_rows
from rwkv_miss.data.tokenizers import load_tokenizer
from rwkv_miss.errors import UserError
from rwkv_miss.model.load import running_dtype
from rwkv_miss.model.recognise import infer_config
from rwkv_miss.model.versions import MODELS
from rwkv_miss.ops.dispatch import check_usable
from rwkv_miss.training.checks import is_first_process
from rwkv_miss.training.objective import Objective, find_objective


@dataclass(frozen=True)
class Prepared:
    """tensors: the base's, memory-mapped. dtype: what the model runs in. micro_batches: in an optimizer step, on each
    device; each window of a row is one. total_steps: the optimizer steps of the whole run."""

    tensors: Mapping[str, Tensor]
    sizes: ModelConfig
    dtype: torch.dtype
    objective: Objective
    rows: AnyRows
    report: PackReport
    val_rows: AnyRows | None
    val_report: PackReport | None
    micro_batches: int
    total_steps: int
    samples: list[Document]
    """The documents that sample answers are asked from."""


def prepare(config: TrainConfig) -> Prepared:
    """Reads the data and looks at the base.

    Raises:
        UserError: something in the base, the data or the settings does not fit together.
    """
    _check_devices(config)
    tensors = read_checkpoint(config.base)
    sizes = infer_config(tensors, config.base)
    dtype = running_dtype(tensors, None if config.precision == "auto" else config.precision)
    unused = MODELS[sizes.version].unused
    make_plan(config.adapter, sizes, {key: t.shape for key, t in tensors.items() if key not in unused})
    if is_first_process():  # only here: the others must not use its GPU
        device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        check_usable(MODELS[sizes.version].op, config.wkv_backend, device, dtype, sizes.head_size)
    objective = find_objective(config.objective)
    if objective.group_size is not None and config.bptt_chunks:
        raise UserError(
            f"objective {config.objective} needs whole rows, but bptt_chunks is {config.bptt_chunks}; leave it out"
        )
    rows, report, val_rows, val_report, samples = _read_rows(config, sizes, objective)
    rows_a_step = config.batch_size * config.accumulate * config.devices * config.num_nodes
    return Prepared(
        tensors,
        sizes,
        dtype,
        objective,
        rows,
        report,
        val_rows,
        val_report,
        micro_batches=config.accumulate * count_windows(rows, config.window_len),
        total_steps=config.max_steps or config.epochs * -(-len(rows) // rows_a_step),
        samples=samples,
    )


def _read_rows(
    config: TrainConfig, sizes: ModelConfig, objective: Objective
) -> tuple[AnyRows, PackReport, AnyRows | None, PackReport | None, list[Document]]:
    """(rows, their report, the validation's rows, their report, the documents to ask sample answers from); the rows and
    the report of the validation are None where nothing validates."""
    tokenizer, group_size = load_tokenizer(config.tokenizer), objective.group_size
    documents = read_documents(config.data, tokenizer, sizes.vocab_size, config)
    held_out = read_documents(config.val_data, tokenizer, sizes.vocab_size, config) if config.val_data else []
    if config.val_split:
        documents, held_out = split_validation(documents, config.val_split, config.seed, group_size)
    carry = config.long_documents == "carry"

    def fit(documents: Sequence[Document], name: str) -> tuple[AnyRows, PackReport]:
        rows, report = make_rows(documents, config.ctx_len, config.packing, carry, group_size)
        check_losses(report, name, config.allow_dropping)
        return rows, report

    rows, report = fit(documents, config.data)
    if config.chunk_len and report.longest <= config.chunk_len:
        raise UserError(
            f"{config.data}: no document is longer than chunk_len {config.chunk_len} (the longest has "
            f"{report.longest} tokens); lower chunk_len, or leave it out"
        )
    asked = (document for document in held_out or documents if len(document.ids) > 1)
    samples = list(islice(asked, config.sample_count if config.sample_every else 0))
    if not held_out:
        return rows, report, None, None, samples
    return rows, report, *fit(held_out, config.val_data or f"{config.data}, held out"), samples


def _check_devices(config: TrainConfig) -> None:
    here = torch.cuda.device_count()
    if torch.cuda.is_available() and config.devices > here:
        raise UserError(f"devices is {config.devices}; this machine has {here} GPU{'s' if here > 1 else ''}")
