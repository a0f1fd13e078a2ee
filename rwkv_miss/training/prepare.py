"""What a run trains on and what it trains, found from the data and from the base's keys and shapes: every check that
needs no model is made here, before the base's weights are loaded."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from rwkv_miss.adapters.files import adapters_template, read_adapter
from rwkv_miss.adapters.method import problems
from rwkv_miss.adapters.plan import make_plan
from rwkv_miss.checkpoint import read_checkpoint
from rwkv_miss.config import ModelConfig, TrainConfig
from rwkv_miss.data.batches import count_windows
from rwkv_miss.data.documents import Document
from rwkv_miss.data.filling import fill_of_batches, too_empty
from rwkv_miss.data.packing import PackReport, check_losses, first_documents
from rwkv_miss.data.parts import Part, PartSettings, read_parts
from rwkv_miss.data.rows import Rows
from rwkv_miss.data.sources import data_name, parse_sources
from rwkv_miss.data.templates import settled
from rwkv_miss.errors import UserError
from rwkv_miss.model.load import running_dtype
from rwkv_miss.model.quantised import quantised_linears, refuse_training, unusable
from rwkv_miss.model.recognise import infer_config
from rwkv_miss.model.versions import MODELS
from rwkv_miss.ops.dispatch import check_usable
from rwkv_miss.training.checks import is_first_process
from rwkv_miss.training.objective import Objective, find_objective

_log = logging.getLogger("rwkv_miss")
_C = TypeVar("_C", bound=TrainConfig)


@dataclass(frozen=True)
class Prepared:
    """tensors: the base's, memory-mapped. dtype: what the model runs in. reports: of each source. micro_batches: in an
    optimizer step, on each device; each window of a row is one. steps_an_epoch, total_steps: optimizer steps in an
    epoch and in the whole run. val_every: those between validations; 0 validates at the end of each epoch. samples: the
    documents that sample answers are asked from."""

    tensors: Mapping[str, Tensor]
    sizes: ModelConfig
    dtype: torch.dtype
    objective: Objective
    rows: Rows
    reports: list[tuple[str, PackReport]]
    val_rows: Rows | None
    val_report: PackReport | None
    micro_batches: int
    steps_an_epoch: int
    total_steps: int
    val_every: int
    samples: list[Document]

    def validation_is_due(self, step: int) -> bool:
        """Whether a validation follows optimizer step `step`."""
        if self.val_rows is None:
            return False
        return step % (self.val_every or self.steps_an_epoch) == 0 or step == self.total_steps


def with_adapters_settings(config: _C) -> _C:
    """The settings of a run, with a template that no file has to be read for, and with those of `adapter_from`'s folder
    as its adapter's.

    Raises:
        UserError: the folder cannot be read, or its methods have no use for a setting of the run.
    """
    config = settled(config, adapters_template(config.adapter_from))
    if config.adapter_from is None:
        return config
    config = replace(config, adapter=read_adapter(config.adapter_from).config)
    if found := problems(config.adapter, config):
        raise UserError(f"{config.adapter_from}: {'; '.join(found)}")
    return config


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
    plan = make_plan(config.adapter, sizes, {key: t.shape for key, t in tensors.items() if key not in unused})
    if config.quant != "none":
        refuse_training(plan.whole, quantised_linears(sizes, config.quant, config.quant_skip))
    if is_first_process():  # only here: the others must not use its GPU
        device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        check_usable(MODELS[sizes.version].op, config.wkv_backend, device, dtype, sizes.head_size)
        if config.quant != "none" and (reason := unusable(config.quant, dtype, device)):
            raise UserError(f"quant {config.quant} cannot be used on {device}: {reason}")
    objective = find_objective(config.objective)
    if objective.group_size is not None and config.bptt_chunks:
        raise UserError(
            f"objective {config.objective} needs whole rows, but bptt_chunks is {config.bptt_chunks}; leave it out"
        )
    train, *others = _read_parts(config, sizes, objective)
    val = others[0] if others else None
    rows_a_step = config.batch_size * config.accumulate * config.devices * config.num_nodes
    steps_an_epoch = -(-train.rows.epoch_size // rows_a_step)
    return Prepared(
        tensors,
        sizes,
        dtype,
        objective,
        train.rows,
        train.reports,
        val and val.rows,
        val and val.report,
        micro_batches=config.accumulate * count_windows(train.rows, config.window_len),
        steps_an_epoch=steps_an_epoch,
        total_steps=config.max_steps or config.epochs * steps_an_epoch,
        val_every=config.val_every,
        samples=first_documents((val or train).rows, config.sample_count if config.sample_every else 0),
    )


def _read_parts(config: TrainConfig, sizes: ModelConfig, objective: Objective) -> list[Part]:
    """What is trained on, and what validates if anything does."""
    settings = PartSettings(
        tokenizer=config.tokenizer,
        vocab_size=sizes.vocab_size,
        ctx_len=config.ctx_len,
        packing=config.packing,
        carry=config.long_documents == "carry",
        group_size=objective.group_size,
        val_split=config.val_split,
        seed=config.seed,
    )
    options = config.of_data()
    parts = read_parts(parse_sources(config.data, options), settings)
    if config.val_data:
        parts += read_parts(parse_sources(config.val_data, options, weights=False), settings)
    for name, report in (found for part in parts for found in part.reports):
        check_losses(report, name, config.allow_dropping)
    rows, together = parts[0].rows, config.batch_size * config.devices * config.num_nodes
    fill = parts[0].report.fill if config.packing else fill_of_batches(rows.filled, rows.used, together)
    if said := too_empty(fill, config.packing):
        _log.warning("%s: %s", data_name(config.data), said)
    longest = parts[0].report.longest
    if config.chunk_len and longest <= config.chunk_len:
        raise UserError(
            f"{data_name(config.data)}: no document is longer than chunk_len {config.chunk_len} (the longest has "
            f"{longest} tokens); lower chunk_len, or leave it out"
        )
    return parts


def _check_devices(config: TrainConfig) -> None:
    here = torch.cuda.device_count()
    if torch.cuda.is_available() and config.devices > here:
        raise UserError(f"devices is {config.devices}; this machine has {here} GPU{'s' if here > 1 else ''}")
