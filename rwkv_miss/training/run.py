"""A training run from its settings to its output folder."""

from __future__ import annotations

import logging
import os
import shutil
import zipfile
from dataclasses import asdict, dataclass, fields
from functools import partial
from inspect import signature
from pathlib import Path

import lightning as L
import torch
import yaml
from lightning.pytorch.callbacks import LambdaCallback
from rich.console import Console

import rwkv_miss
from rwkv_miss.adapters.full import whole_parameters
from rwkv_miss.adapters.inject import inject
from rwkv_miss.checkpoint import read_checkpoint
from rwkv_miss.config import AdapterConfig, TrainConfig, check
from rwkv_miss.data.batches import count_windows
from rwkv_miss.data.corpus import read_documents
from rwkv_miss.data.documents import split_validation
from rwkv_miss.data.packing import check_losses, make_rows
from rwkv_miss.data.tokenizers import load_tokenizer
from rwkv_miss.errors import RunError, UserError
from rwkv_miss.files import atomic_write
from rwkv_miss.model import load_model
from rwkv_miss.model.initial_state import is_state
from rwkv_miss.ops.dispatch import check_usable
from rwkv_miss.training import strategies
from rwkv_miss.training.data_module import PackedData
from rwkv_miss.training.lit_module import LitRWKV
from rwkv_miss.training.reporting import Reporter
from rwkv_miss.training.saving import Saver, last_checkpoint

_OURS = ("adapter", "checkpoints", "tensorboard", "metrics.csv", "config.yaml")
# What a resumed run must have in common with the run that it goes on with. AdamW's settings come from the checkpoint,
# whatever is given; the base is told by its fingerprint, since its file may have moved.
_SAME = (
    *("data", "tokenizer", "text_field", "prompt_field", "answer_field", "separator", "answer_lines", "answer_end"),
    *("val_data", "val_split"),
    *("ctx_len", "long_documents", "chunk_len", "bptt_chunks", "batch_size", "accumulate", "packing", "seed"),
    *("adapter", "precision", "lr", "lr_state", "weight_decay", "betas", "strategy", "devices", "num_nodes"),
)
# What runs did before they had a setting, where that is not its default now.
_BEFORE = {"answer_lines": "join", "answer_end": "blank_line"}


@dataclass(frozen=True)
class TrainResult:
    steps: int
    loss: float | None
    base_val_loss: float | None
    best_val_loss: float | None
    best_step: int


def train(config: TrainConfig, console: Console) -> TrainResult:
    """Fine-tunes as `config` says. Everything the user gave is checked before anything is written.

    Raises:
        UserError: something in the settings, the base, the data or the output folder is wrong.
        RunError: the loss was not finite, or the GPU's memory too small.
        Stopped: a signal ended the run, after a checkpoint.
    """
    check(config)
    _check_devices(config)
    out = Path(config.out)
    # Lightning starts the other ranks by running the command again; only the first looks at the folder.
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0 and int(os.environ.get("NODE_RANK", 0)) == 0
    if not first:  # what it says, all would say
        console = Console(quiet=True)
        logging.getLogger("rwkv_miss").setLevel(logging.ERROR)
    resume = (
        _check_out(out, config) if first else last_checkpoint(out / "checkpoints") if config.resume == "auto" else None
    )
    L.seed_everything(config.seed, verbose=False)

    model = load_model(config.base, None if config.precision == "auto" else config.precision, "cpu", config.wkv_backend)
    sizes = model.config
    model.gradient_checkpointing = config.gradient_checkpointing
    inject(model, config.adapter)
    in_file = read_checkpoint(config.base)
    for key, parameter in whole_parameters(model).items():
        if not is_state(key):  # which begins at zero, or is fp32 in the model too
            parameter.data.copy_(in_file[key])  # the model's own may be rounded to `precision`
    if first:  # alone: the others have no business on its GPU
        device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        check_usable(f"wkv{sizes.version}", config.wkv_backend, device, model.emb.weight.dtype, sizes.head_size)
    tokenizer = load_tokenizer(config.tokenizer)
    documents = read_documents(config.data, tokenizer, sizes.vocab_size, config)
    held_out = read_documents(config.val_data, tokenizer, sizes.vocab_size, config) if config.val_data else []
    if config.val_split:
        documents, held_out = split_validation(documents, config.val_split, config.seed)
    fit = partial(make_rows, ctx_len=config.ctx_len, packing=config.packing, carry=config.long_documents == "carry")
    rows, report = fit(documents)
    if config.chunk_len and report.longest <= config.chunk_len:
        raise UserError(
            f"{config.data}: no document is longer than chunk_len {config.chunk_len} (the longest has "
            f"{report.longest} tokens); lower chunk_len, or leave it out"
        )
    check_losses(report, config.data, config.allow_dropping)
    val_rows, val_report = fit(held_out) if held_out else (None, None)
    if val_report:
        check_losses(val_report, config.val_data or f"{config.data}, held out", config.allow_dropping)

    rows_a_step = config.batch_size * config.accumulate * config.devices * config.num_nodes
    total_steps = config.max_steps or config.epochs * -(-len(rows) // rows_a_step)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    console.print(
        f"RWKV-{sizes.version}, {sizes.n_layer} layers of {sizes.n_embd}, vocabulary {sizes.vocab_size:,}: "
        f"{sum(p.numel() for p in model.parameters()) - trainable:,} parameters frozen in "
        f"{str(model.emb.weight.dtype).removeprefix('torch.')}, {trainable:,} trained",
        highlight=False,
        soft_wrap=True,
    )
    console.print(f"training: {report}", highlight=False, soft_wrap=True)
    if val_report:
        console.print(f"validation: {val_report}", highlight=False, soft_wrap=True)
    if resume and resume[1] >= total_steps:
        raise UserError(
            f"{out}: the run is done ({resume[1]} of {total_steps} steps); raise epochs or max_steps to go on"
        )
    extra = {
        "tokenizer": config.tokenizer,
        "template": "rwkv-world",
        "answer_lines": config.answer_lines,
        "answer_end": config.answer_end,
    }
    saver = Saver(out, config.save_every, total_steps, val_rows is not None, extra)
    reporter = Reporter(out, config.log_every, total_steps, console)
    micro_batches = config.accumulate * count_windows(rows, config.window_len)
    # The folder is touched as late as can be: what is wrong with the checkpoint or the strategy is found before.
    starter = LambdaCallback(on_train_start=lambda trainer, _: trainer.is_global_zero and _start_folder(out, config))
    trainer = _trainer(
        config, micro_batches, [starter, reporter, saver], has_val=val_rows is not None, resumed=resume is not None
    )
    module = LitRWKV(model, config, total_steps)
    try:
        trainer.fit(
            module, PackedData(rows, val_rows, config), ckpt_path=resume[0] if resume else None, weights_only=False
        )
    except torch.OutOfMemoryError as e:
        raise RunError(
            f"step {trainer.global_step + 1}: the GPU ran out of memory ({str(e).splitlines()[0]}). Lower batch_size "
            f"({config.batch_size}; accumulate makes up for it) or ctx_len ({config.ctx_len}), or give "
            "--chunk_len or --gradient_checkpointing true"
        ) from None
    return TrainResult(trainer.global_step, reporter.last_loss, reporter.base_val_loss, saver.best, saver.best_step)


def _trainer(
    config: TrainConfig, micro_batches: int, callbacks: list[L.Callback], has_val: bool, resumed: bool
) -> L.Trainer:
    """micro_batches: in an optimizer step, on each device."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    on_gpu = torch.cuda.is_available()
    strategy, plugins = strategies.build(config, on_gpu)
    every = config.val_every * micro_batches
    return L.Trainer(
        accelerator="cuda" if on_gpu else "cpu",
        devices=config.devices,
        num_nodes=config.num_nodes,
        strategy=strategy,
        plugins=plugins,
        precision=None if plugins else "32-true",
        max_epochs=-1,
        accumulate_grad_batches=micro_batches,
        gradient_clip_val=config.grad_clip or None,
        val_check_interval=every or None,
        check_val_every_n_epoch=None if every else 1,
        limit_val_batches=None if has_val else 0,
        # The whole validation before the first step: the base's own loss.
        num_sanity_val_steps=-1 if has_val and not resumed else 0,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )


def _check_devices(config: TrainConfig) -> None:
    here = torch.cuda.device_count()
    if torch.cuda.is_available() and config.devices > here:
        raise UserError(f"devices is {config.devices}; this machine has {here} GPU{'s' if here > 1 else ''}")


def _check_out(out: Path, config: TrainConfig) -> tuple[Path, int] | None:
    """The checkpoint to resume from, if any; UserError where the folder may not be used."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; out must be a folder")
    found = [name for name in _OURS if (out / name).exists()]
    if not found or config.overwrite:
        return None
    if config.resume != "auto":
        raise UserError(
            f"{out}: holds another run ({', '.join(found)}); give another out, --resume auto to go on with it, or "
            "--overwrite true to replace it"
        )
    if (out / "config.yaml").is_file():
        before, now = _read_settings(out / "config.yaml"), _as_yaml(config)
        if changed := [f"{k} was {before[k]}, is {now[k]}" for k in _SAME if before[k] != now[k]]:
            raise UserError(f"{out}: cannot resume with other settings: {'; '.join(changed)}")
    checkpoint = last_checkpoint(out / "checkpoints")
    if checkpoint and checkpoint[0].is_file() and not zipfile.is_zipfile(checkpoint[0]):
        raise UserError(f"{checkpoint[0]}: not a whole checkpoint (truncated?); start anew with --overwrite true")
    return checkpoint


def _read_settings(path: Path) -> dict:
    """A run's settings; those that it did not have yet were at their defaults, or as `_BEFORE` says."""
    try:
        found = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError):
        found = None
    if not isinstance(found, dict) or not isinstance(found.get("adapter"), dict):
        raise UserError(f"{path}: not the settings of a run; remove the file, or start anew with --overwrite true")
    defaults = {f.name: f.default for f in fields(TrainConfig)}
    return defaults | _BEFORE | found | {"adapter": asdict(AdapterConfig()) | found["adapter"]}


def _start_folder(out: Path, config: TrainConfig) -> None:
    if config.overwrite:
        for name in _OURS:
            if (out / name).is_dir():
                shutil.rmtree(out / name)
            else:
                (out / name).unlink(missing_ok=True)
    with atomic_write(out / "config.yaml") as part:
        part.write_text(f"# rwkv-miss {rwkv_miss.__version__}\n" + yaml.safe_dump(_as_yaml(config), sort_keys=False))


def _as_yaml(config: TrainConfig) -> dict:
    values = asdict(config)
    # The order of the help, which begins with base, data, tokenizer and out.
    ordered = {name: values[name] for name in signature(TrainConfig).parameters}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in ordered.items()}
