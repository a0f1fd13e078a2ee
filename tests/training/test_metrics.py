"""What a run writes row by row: metrics.csv, TensorBoard's events and W&B's run; full disks and damaged files."""

from __future__ import annotations

import importlib.util
import math
import time
from dataclasses import replace
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rwkv_miss.errors import RunError, UserError
from rwkv_miss.training import appended
from rwkv_miss.training.checks import last_checkpoint
from rwkv_miss.training.lit_module import LitRWKV
from rwkv_miss.training.saving import Saver
from tests.training.runs import losses, quiet_train


def test_a_run_that_is_killed_before_its_first_checkpoint_leaves_no_rows(make_config, monkeypatch):
    """Not even that of the base's validation, which is made before step 1."""
    config = make_config(max_steps=2, val_split=0.2, sample_every=1)
    with monkeypatch.context() as patch:
        patch.setattr(Saver, "on_train_batch_end", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            quiet_train(config)
    out = Path(config.out)
    assert losses(out, "step") == [0, 1] and last_checkpoint(out / "checkpoints") is None
    quiet_train(replace(config, resume="auto"))
    assert losses(out, "step") == [0, 1, 2, 2]
    assert (out / "samples.jsonl").read_text().count('"step": 0') == 3
    board = EventAccumulator(str(out / "tensorboard")).Reload()
    assert [e.step for e in board.Scalars("val_loss")] == [0, 2]


def test_what_was_being_written_at_the_end_is_no_row(make_config):
    config = make_config(max_steps=1)
    quiet_train(config)
    metrics = Path(config.out) / "metrics.csv"
    whole = metrics.read_text()
    metrics.write_text(whole + "1")  # of a row of step 10, say
    quiet_train(replace(config, max_steps=2, resume="auto"))
    assert metrics.read_text().startswith(whole) and losses(config.out, "step") == [1, 2]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda text: text.encode().replace(b"loss", b"l\xf6ss"), "line 1: not UTF-8"),
        (lambda text: text.encode() + b"\0" * 20 + b"\n", "line 3: it holds NUL characters"),
        (lambda text: text.replace("step", "steps").encode(), "line 1: the columns are 'steps,epoch,"),
        (lambda text: text.replace("\n1,", "\n1,7,").encode(), "line 2: 13 values for 12 columns"),
        (lambda text: text.replace("\n1,", "\none,").encode(), "line 2: the step is 'one'"),
        (lambda text: text.replace("0.01", "small").encode(), "line 2: lr is 'small', which is no number"),
        (lambda text: b"\xff\xfe\n", "line 1: not UTF-8"),
    ],
)
def test_a_damaged_metrics_csv_is_one_message_at_a_resume(make_config, damage, said):
    config = make_config(max_steps=1)
    quiet_train(config)
    metrics = Path(config.out) / "metrics.csv"
    metrics.write_bytes(damage(metrics.read_text()))
    before = {path: path.read_bytes() for path in Path(config.out).rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=rf"metrics\.csv: {said}.*--overwrite true$"):
        quiet_train(replace(config, max_steps=2, resume="auto"))
    assert {path: path.read_bytes() for path in Path(config.out).rglob("*") if path.is_file()} == before
    metrics.unlink()
    assert quiet_train(replace(config, max_steps=2, resume="auto")).steps == 2
    assert losses(config.out, "step") == [2]


@pytest.mark.parametrize("name", ["metrics.csv", "samples.jsonl"])
def test_a_folder_in_the_place_of_a_file(make_config, name):
    config = make_config(max_steps=1, sample_every=1)
    quiet_train(config)
    path = Path(config.out) / name
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match=rf"{name}: is a folder; a run writes a file there"):
        quiet_train(replace(config, max_steps=2, resume="auto"))


def test_damaged_samples_are_one_message_at_a_resume(make_config):
    config = make_config(max_steps=1, sample_every=1)
    quiet_train(config)
    path = Path(config.out) / "samples.jsonl"
    path.write_text(path.read_text() + '{"step": "1"}\n')
    with pytest.raises(UserError, match=r"samples\.jsonl: line 7: '{\"step\": \"1\"}' is no sample of a run; mend"):
        quiet_train(replace(config, max_steps=2, resume="auto"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["metrics.csv", "tensorboard/", "samples.jsonl"])
def test_a_full_disk_ends_the_run_with_the_files_name(make_config, monkeypatch, full_disk, name):
    """From step 2 on; the checkpoint of step 1 stays, and the run goes on from it."""
    config = make_config(max_steps=3, save_every=1, sample_every=1)
    write = appended.AppendedFile.write

    def write_on_full_disk(self, data):
        if name in str(self.path) and last_checkpoint(Path(config.out) / "checkpoints"):
            with full_disk(self.path.stat().st_size + 5):
                return write(self, data)
        return write(self, data)

    with monkeypatch.context() as patch:
        patch.setattr(appended.AppendedFile, "write", write_on_full_disk)
        with pytest.raises(
            RunError, match=rf"{name}.*: cannot be written: File too large; what was saved before is un"
        ):
            quiet_train(config)
    assert last_checkpoint(Path(config.out) / "checkpoints")[1] in (1, 2)  # samples come after the checkpoint
    assert "cannot be written: File too large" in (Path(config.out) / "report.html").read_text()
    assert quiet_train(replace(config, resume="auto")).steps == 3
    assert losses(config.out, "step") == [1, 2, 3]


def test_the_speed_is_that_of_training_alone(make_config, monkeypatch):
    """Validation between two reports is not counted, though the tokens on both sides of it are."""
    config = make_config(max_steps=4, log_every=4, val_split=0.2, val_every=2, packing=True, overwrite=True)
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])

    def taking(seconds, step):
        def timed(*arguments):
            clock[0] += seconds
            return step(*arguments)

        return timed

    monkeypatch.setattr(LitRWKV, "training_step", taking(1, LitRWKV.training_step))
    monkeypatch.setattr(LitRWKV, "validation_step", taking(1000, LitRWKV.validation_step))
    quiet_train(config)
    tokens = dict(zip(losses(config.out, "step"), losses(config.out, "tokens"), strict=True))
    assert losses(config.out, "tokens_per_s")[1] == pytest.approx((tokens[4] - tokens[1]) / 3)


def test_memory_is_that_of_the_process(make_config):
    config = make_config(max_steps=1)
    quiet_train(config)
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    assert losses(config.out, "memory_mb")[0] == pytest.approx(int(peak.split()[1]) * 1024 / 1e6, rel=0.02)


def test_a_gradient_that_is_not_finite_is_a_figure_too(make_config, monkeypatch):
    config = make_config(max_steps=2, grad_clip=0.0)
    step = LitRWKV.training_step

    def without_gradient(self, batch, batch_idx):
        loss = step(self, batch, batch_idx)
        loss.register_hook(lambda g: g * math.nan)
        return loss

    monkeypatch.setattr(LitRWKV, "training_step", without_gradient)
    with pytest.raises(RunError, match="step 2: the loss is nan"):
        quiet_train(config)
    assert math.isnan(losses(config.out, "grad_norm")[0])
    assert "step 2: the loss is nan" in (Path(config.out) / "report.html").read_text()


def test_wandb_that_is_not_installed(make_config, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"^loggers has wandb, which is not installed; install it: pip install wandb$"):
        quiet_train(make_config(loggers=["wandb"], base="nowhere.pth"))


@pytest.mark.slow
def test_wandb_without_a_network(make_config, monkeypatch):
    """It gets the figures of metrics.csv, and a resumed run goes on under the same name."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logged, log = [], wandb.Run.log
    monkeypatch.setattr(wandb.Run, "log", lambda run, data, **more: (logged.append(data), log(run, data, **more)))
    config = make_config(max_steps=2, loggers=["wandb"], sample_every=2)
    quiet_train(config)
    first = (Path(config.out) / "wandb" / "latest-run").resolve()
    quiet_train(replace(config, max_steps=3, resume="auto"))
    second = (Path(config.out) / "wandb" / "latest-run").resolve()
    assert first != second and first.name.split("-")[-1] == second.name.split("-")[-1]
    assert list(first.glob("*.wandb")) and list(second.glob("*.wandb")) and wandb.run is None
    assert [row["loss"] for row in logged if "loss" in row] == pytest.approx(losses(config.out), rel=1e-5)
    assert [row["trainer/global_step"] for row in logged if "samples" in row] == [0, 2, 3]
    quiet_train(replace(config, max_steps=1, overwrite=True, loggers=[]))
    assert not (Path(config.out) / "wandb").exists()


def test_wandb_without_a_login(make_config, monkeypatch):
    wandb = pytest.importorskip("wandb")

    def refuse(**_):
        raise wandb.errors.UsageError("No API key configured. Use `wandb login` to log in.")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(RunError, match=r"W&B cannot begin a run: No API key .* to log in; set WANDB_MODE=offline"):
        quiet_train(make_config(max_steps=1, loggers=["wandb"]))
