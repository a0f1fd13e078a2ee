"""What a run trains on and what it trains, found from the data and from the base's keys and shapes: every check that
needs no model is made here, before the base's weights are loaded."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import TypeVar

import torch
from torch import Tensor

from rwkv_miss.adapters.files import adapters_template, read_adapter
from rwkv_miss.adapters.method import problems
from rwkv_miss.adapters.plan import make_plan
from rwkv_miss.checkpoint import read_checkpoint
from rwkv_miss.config import DataOptions, ModelConfig, TrainConfig
from rwkv_miss.data.batches import count_windows
from rwkv_miss.data.cache import cached_parts
from rwkv_miss.data.documents import Document
from rwkv_miss.data.filling import fill_of_batches, too_empty
from rwkv_miss.data.packing import AnyRows, PackReport, check_losses, first_documents
from rwkv_miss.data.parts import PartSettings
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
    """tensors: the base's, memory-mapped. dtype: what the model runs in. micro_batches: in an optimizer step, on each
    device; each window of a row is one. steps_an_epoch, total_steps: optimizer steps in an epoch and in the whole
    run. val_every: those between validations; 0 validates at the end of each epoch. samples: the documents
    that sample answers are asked from."""

    tensors: Mapping[str, Tensor]
    sizes: ModelConfig
    dtype: torch.dtype
    objective: Objective
    rows: AnyRows
    report: PackReport
    val_rows: AnyRows | None
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
    rows, report, val_rows, val_report = _read_rows(config, sizes, objective)
    rows_a_step = config.batch_size * config.accumulate * config.devices * config.num_nodes
    steps_an_epoch = -(-len(rows) // rows_a_step)
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
        steps_an_epoch=steps_an_epoch,
        total_steps=config.max_steps or config.epochs * steps_an_epoch,
        val_every=config.val_every,
        samples=first_documents(val_rows or rows, config.sample_count if config.sample_every else 0),
    )


def _read_rows(
    config: TrainConfig, sizes: ModelConfig, objective: Objective
) -> tuple[AnyRows, PackReport, AnyRows | None, PackReport | None]:
    """(rows, their report, the validation's rows, their report); the last two are None where nothing validates."""
    settings = PartSettings(
        data=config.data,
        tokenizer=config.tokenizer,
        vocab_size=sizes.vocab_size,
        ctx_len=config.ctx_len,
        packing=config.packing,
        carry=config.long_documents == "carry",
        group_size=objective.group_size,
        val_split=config.val_split,
        seed=config.seed if config.val_split else 0,
        options=DataOptions(**{field.name: getattr(config, field.name) for field in fields(DataOptions)}),
    )
    parts = cached_parts(settings)
    if config.val_data:
        parts += cached_parts(replace(settings, data=config.val_data))
    for (_, report), name in zip(parts, (config.data, config.val_data or f"{config.data}, held out"), strict=False):
        check_losses(report, name, config.allow_dropping)
    (rows, report), *validation = parts
    together = config.batch_size * config.devices * config.num_nodes
    fill = report.fill if config.packing else fill_of_batches(rows.filled, rows.used, together)
    if said := too_empty(fill, config.packing):
        _log.warning("%s: %s", config.data, said)
    if config.chunk_len and report.longest <= config.chunk_len:
        raise UserError(
            f"{config.data}: no document is longer than chunk_len {config.chunk_len} (the longest has "
            f"{report.longest} tokens); lower chunk_len, or leave it out"
        )
    return rows, report, *(validation[0] if validation else (None, None))


def _check_devices(config: TrainConfig) -> None:
    here = torch.cuda.device_count()
    if torch.cuda.is_available() and config.devices > here:
        raise UserError(f"devices is {config.devices}; this machine has {here} GPU{'s' if here > 1 else ''}")
