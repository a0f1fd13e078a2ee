"""What a run trains on and what it trains, found from the data and from the base's keys and shapes: every check that
needs no model is made here, before the base's weights are loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rwkv_miss.adapters.plan import make_plan
from rwkv_miss.checkpoint import read_checkpoint
from rwkv_miss.config import ModelConfig, TrainConfig
from rwkv_miss.data.batches import count_segments
from rwkv_miss.data.documents import split_validation
from rwkv_miss.data.mapped import MappedRows
from rwkv_miss.data.packing import PackReport, Rows, make_rows
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
    device. total_steps: the optimizer steps of the whole run."""

    tensors: Mapping[str, Tensor]
    sizes: ModelConfig
    dtype: torch.dtype
    objective: Objective
    rows: Rows | MappedRows
    report: PackReport
    val_rows: Rows | MappedRows | None
    val_report: PackReport | None
    micro_batches: int
    total_steps: int


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
    if is_first_process():  # alone: the others have no business on its GPU
        device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        check_usable(MODELS[sizes.version].op, config.wkv_backend, device, dtype, sizes.head_size)
    objective = find_objective(config.objective)
    if objective.group_size is not None and config.bptt_chunks:
        raise UserError(
            f"objective {config.objective} needs whole rows, but bptt_chunks is {config.bptt_chunks}; leave it out"
        )
    rows, report, val_rows, val_report = _read_rows(config, sizes, objective)
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
        micro_batches=config.accumulate * count_segments(rows, config.segment_len),
        total_steps=config.max_steps or config.epochs * -(-len(rows) // rows_a_step),
    )


def _read_rows(config: TrainConfig, sizes: ModelConfig, objective: Objective) -> tuple[Any, PackReport, Any, Any]:
    """(rows, their report, the validation's rows, their report); None where nothing validates."""
    documents = read_documents(config.data, config, sizes.vocab_size)
    held_out = read_documents(config.val_data, config, sizes.vocab_size) if config.val_data else []
    if config.val_split:
        documents, held_out = split_validation(documents, config.val_split, config.seed)
    fit = partial(make_rows, ctx_len=config.ctx_len, packing=config.packing, carry=config.long_documents == "carry")
    rows, report = fit(documents)
    if config.chunk_len and report.longest <= config.chunk_len:
        raise UserError(
            f"{config.data}: no document is longer than chunk_len {config.chunk_len} (the longest has "
            f"{report.longest} tokens); lower chunk_len, or leave it out"
        )
    val_rows, val_report = fit(held_out) if held_out else (None, None)
    return rows, report, val_rows, val_report


def _check_devices(config: TrainConfig) -> None:
    here = torch.cuda.device_count()
    if torch.cuda.is_available() and config.devices > here:
        raise UserError(f"devices is {config.devices}; this machine has {here} GPU{'s' if here > 1 else ''}")


def read_documents(path, config, vocab_size):
    from rwkv_miss.data.binidx import binidx_prefix
    from rwkv_miss.data.documents import encode_record
    from rwkv_miss.data.mapped import open_documents
    from rwkv_miss.data.records import read_records
    from rwkv_miss.data.tokenizers import load_tokenizer

    tokenizer = load_tokenizer(config.tokenizer)
    options = {name: getattr(config, name) for name in ("text_field", "prompt_field", "answer_field", "separator")}
    if prefix := binidx_prefix(path):
        return open_documents(prefix, vocab_size, **options)
    records = read_records(path, **options)
    return [encode_record(record, tokenizer, vocab_size) for record in records]
