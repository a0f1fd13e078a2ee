"""A training run: the model, the data and Lightning's trainer put together, into the run's folder."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from lightning.pytorch.callbacks import LambdaCallback
from rich.console import Console

import rwkv_miss
from rwkv_miss.adapters.files import load_adapter, read_facts
from rwkv_miss.adapters.inject import inject, trained_parameters
from rwkv_miss.config import TrainConfig
from rwkv_miss.data.packing import join_reports
from rwkv_miss.data.templates import find_template
from rwkv_miss.data.tokenizers import load_tokenizer
from rwkv_miss.errors import RunError, UserError
from rwkv_miss.files import atomic_write, remove
from rwkv_miss.fingerprints import fingerprint
from rwkv_miss.model.base import RWKV
from rwkv_miss.model.load import build_model
from rwkv_miss.model.quantised import QuantLinear
from rwkv_miss.training import moving, strategies
from rwkv_miss.training.card import card_facts
from rwkv_miss.training.checks import OURS, Resume, as_yaml, written_by_runs
from rwkv_miss.training.data_module import PackedData
from rwkv_miss.training.lit_module import LitRWKV
from rwkv_miss.training.prepare import Prepared, prepare, with_adapters_settings
from rwkv_miss.training.progress import TrainingDisplay
from rwkv_miss.training.record import Record
from rwkv_miss.training.reporting import Reporter
from rwkv_miss.training.result import TrainResult
from rwkv_miss.training.samples import Sampler
from rwkv_miss.training.saving import LAST, Saver, validation_is_pending
from rwkv_miss.training.watch import Watch, is_lost_connection


def run(config: TrainConfig, resume: Resume | None, console: Console) -> TrainResult:
    """As `rwkv_miss.train`, after its first checks (`check_run`).

    Args:
        resume: where to go on, if the run does.
    """
    out, settings = Path(config.out), config
    config = with_adapters_settings(config)
    prepared = prepare(config)
    if resume and resume.step >= prepared.total_steps and not validation_is_pending(out, resume.step, prepared):
        return _done_already(out, resume.step, prepared.total_steps, console)
    L.seed_everything(config.seed, verbose=False)
    model = build_model(
        prepared.tensors, config.base, prepared.dtype, "cpu", config.wkv_backend, config.quant, config.quant_skip
    )
    model.fingerprint = fingerprint(prepared.tensors, config.base)
    model.gradient_checkpointing = config.gradient_checkpointing
    if config.adapter_from is None:
        inject(model, config.adapter, masters=prepared.tensors)
    else:
        load_adapter(model, config.adapter_from)
    introduction = _introduction(model, prepared)
    for line in introduction:
        console.print(line, highlight=False, soft_wrap=True)

    rows = [prepared.rows] if prepared.val_rows is None else [prepared.rows, prepared.val_rows]
    data_fingerprint = " ".join(x.fingerprint() for x in rows)
    module = LitRWKV(model, prepared.objective, config, prepared.total_steps, data_fingerprint)
    display = TrainingDisplay(console, prepared.total_steps)
    reporter = Reporter(module, out, config.loggers, config.log_every, prepared.total_steps, display)
    extra: dict[str, Any] = {
        "tokenizer": config.tokenizer,
        "template": config.template,
        "answer_lines": config.answer_lines,
        "answer_end": config.answer_end,
    }
    if config.quant != "none":
        extra |= {"quant": config.quant, "quant_skip": config.quant_skip}
    extra |= card_facts(config, prepared, model)
    saver = Saver(module, out, config, prepared, extra, reporter)
    # The folder is written to as late as possible, after errors in the checkpoint or the strategy have been found.
    has_begun = False

    def begin(trainer: L.Trainer, _: L.LightningModule) -> None:
        nonlocal has_begun
        has_begun = True
        _start_folder(trainer, out, settings)

    starter = LambdaCallback(on_train_start=begin)
    watch = Watch(config.hang_minutes)
    model.head.register_forward_hook(lambda *_: watch.moved())
    callbacks: list[L.Callback] = [starter, Record(out, prepared.total_steps, introduction), reporter, saver]
    if prepared.samples:
        tokenizer = load_tokenizer(config.tokenizer)
        stop = find_template(config.template).stops
        asked = model, tokenizer, prepared.samples, config.sample_tokens, stop
        callbacks.append(Sampler(*asked, out, config.sample_every, prepared.total_steps, reporter))
    trainer = _trainer(config, prepared, callbacks, watch, resumed=resume is not None)
    data = PackedData(prepared.rows, prepared.val_rows, config)
    checkpoint = resume.path if resume else None
    if resume and resume.changed:
        newest = out / (LAST if prepared.val_rows is not None else "adapter")
        trainer.callbacks.append(moving.restore(trainer, module, resume, newest, prepared.steps_an_epoch))  # type: ignore[attr-defined]
        checkpoint = None
    with watch.guarding():
        try:
            trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
        except torch.OutOfMemoryError as e:
            raise RunError(
                f"step {trainer.global_step + 1}: the GPU ran out of memory ({str(e).splitlines()[0]}). Lower "
                f"batch_size ({config.batch_size}; accumulate makes up for it) or ctx_len ({config.ctx_len}), or give "
                "--chunk_len or --gradient_checkpointing true"
            ) from None
        except (AttributeError, LookupError, TypeError, ValueError, RuntimeError) as e:
            if has_begun or not resume or isinstance(e, (UserError, RunError)) or is_lost_connection(e):
                raise
            raise UserError(
                f"{resume.path}: cannot be gone on from, is it damaged? ({type(e).__name__}: {e}); start anew with "
                "--overwrite true"
            ) from e
    return TrainResult(
        trainer.global_step,
        reporter.first_loss,
        reporter.last_loss,
        reporter.base_val_loss,
        saver.best,
        saver.best_step,
    )


def _done_already(out: Path, steps: int, total_steps: int, console: Console) -> TrainResult:
    """The result of a run that has nothing left to do, so that a scheduler may start it again."""
    done = f"the run is done ({steps} of {total_steps} steps); raise epochs or max_steps to go on"
    if not (kept := read_facts(out / "adapter")):
        raise UserError(f"{out}: {done}. It ended before its adapter was saved, which a further step would save")
    console.print(f"{out}: {done}", highlight=False, soft_wrap=True)
    return TrainResult(steps, None, None, None, kept.get("val_loss"), kept.get("step") or 0)


def _introduction(model: RWKV, prepared: Prepared) -> list[str]:
    """What is trained, and on what."""
    sizes = model.config
    trained = sum(p.numel() for p in trained_parameters(model).values())
    frozen = {p: p.numel() for p in model.parameters() if not p.requires_grad}
    quantised = {m: m.in_features * m.out_features for m in model.modules() if isinstance(m, QuantLinear)}
    formats = sorted({str(p.dtype).removeprefix("torch.") for p in frozen}) + sorted({m.format for m in quantised})
    lines = [
        f"RWKV-{sizes.version}, {sizes.n_layer} layers of {sizes.n_embd}, vocabulary {sizes.vocab_size:,}: "
        f"{sum((frozen | quantised).values()):,} parameters frozen{' in ' + ', '.join(formats) if formats else ''}, "
        f"{trained:,} trained",
        f"training: {join_reports([report for _, report in prepared.reports])}",
    ]
    if len(prepared.reports) > 1:
        lines.append(f"an epoch has {prepared.rows.epoch_size:,} rows:")
        for (name, report), turns in zip(prepared.reports, prepared.rows.turns, strict=True):
            lines.append(f"  {turns:,} of the {report.rows:,} of {name}, which has {report.tokens:,} tokens")
    if prepared.val_report:
        lines.append(f"validation: {prepared.val_report}")
    if n := len(prepared.samples):
        source = "validation data" if prepared.val_report else "training data, since nothing validates"
        lines.append(f"samples: {n} of the {source}")
    return lines


def _trainer(
    config: TrainConfig, prepared: Prepared, callbacks: list[L.Callback], watch: Watch, resumed: bool
) -> L.Trainer:
    for package in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(package).setLevel(logging.WARNING)
    on_gpu = torch.cuda.is_available()
    strategy, plugins = strategies.build(config, on_gpu, watch)
    every = config.val_every * prepared.micro_batches
    validates = prepared.val_rows is not None
    return L.Trainer(
        accelerator="cuda" if on_gpu else "cpu",
        devices=config.devices,
        num_nodes=config.num_nodes,
        strategy=strategy,
        plugins=plugins,
        max_epochs=-1,
        accumulate_grad_batches=prepared.micro_batches,
        gradient_clip_val=config.grad_clip or None,
        val_check_interval=every or None,
        check_val_every_n_epoch=None if every else 1,
        limit_val_batches=None if validates else 0,
        # -1: a whole validation before the first step, which gives the base's own loss.
        num_sanity_val_steps=-1 if validates and not resumed else 0,
        callbacks=callbacks,
        logger=False,  # the Reporter sets the loggers once the run has begun
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )


def _start_folder(trainer: L.Trainer, out: Path, config: TrainConfig) -> None:
    """Removes what an earlier run left, where it is to be replaced or was being written when that run was killed, and
    writes the settings."""
    if not trainer.is_global_zero:
        return
    for path in written_by_runs(out):
        if path.suffix == ".part":
            remove(path)
    if config.overwrite:
        for path in written_by_runs(out):
            remove(path)
        for name in OURS:
            if (out / name).is_dir() and not (out / name).is_symlink() and not any((out / name).iterdir()):
                (out / name).rmdir()
    with atomic_write(out / "config.yaml") as part:
        part.write_text(f"# rwkv-miss {rwkv_miss.__version__}\n" + yaml.safe_dump(as_yaml(config), sort_keys=False))
