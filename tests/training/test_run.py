"""A run's output folder: what is in it, what a second run may do with it, and how a run goes on or ends."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rwkv_miss import load_adapter, load_model, merge
from rwkv_miss.adapters.files import WEIGHTS
from rwkv_miss.adapters.inject import installed
from rwkv_miss.checkpoint import TensorSpec, read_checkpoint, write_pth
from rwkv_miss.config import AdapterConfig
from rwkv_miss.errors import RunError, Stopped, UserError
from rwkv_miss.files import claimed
from rwkv_miss.training import saving
from rwkv_miss.training.checks import last_checkpoint
from rwkv_miss.training.lit_module import LitRWKV
from rwkv_miss.training.saving import Saver
from rwkv_miss.training.start import train
from tests.data.samples import read_documents
from tests.helpers import RunsCode
from tests.processes import run_process
from tests.training.runs import adapter, as_arguments, losses, quiet_train, run_train


def tree(folder: str | Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in Path(folder).rglob("*") if p.is_file()}


def test_what_a_run_leaves(make_config):
    config = make_config(val_split=0.2, val_every=2, epochs=1)
    result = quiet_train(config)
    out = Path(config.out)
    files = tree(out)
    assert {"config.yaml", "metrics.csv", "checkpoints/step-00000006", "adapter/rwkv_miss.json"} <= files
    assert not [f for f in files if ".part" in f]

    # Validation before the first step (the base's own loss), every 2 steps, and a row for each step.
    val = losses(out, "val_loss")
    assert len(val) == 4 and len(losses(out)) == 6
    assert result.base_val_loss == pytest.approx(val[0], rel=1e-5)
    assert result.best_val_loss == pytest.approx(min(val[1:]), rel=1e-5) and min(val[1:]) < val[0]
    assert losses(out, "lr")[0] == config.lr and losses(out, "tokens")[-1] > 0 and losses(out, "tokens_per_s")[0] > 0
    [events] = (out / "tensorboard").iterdir()
    board = EventAccumulator(str(events)).Reload()
    assert [e.value for e in board.Scalars("loss")] == pytest.approx(losses(out), rel=1e-5)

    # A checkpoint holds the adapter and its optimizer, and not the frozen weights.
    saved = torch.load(out / "checkpoints/step-00000006", weights_only=False)
    assert all(name.endswith("miss_block") for name in saved["state_dict"])
    assert (out / "checkpoints/step-00000006").stat().st_size < Path(config.base).stat().st_size * 2
    loaded = load_adapter(load_model(config.base), out / "adapter")
    assert installed(loaded).config.r == 4


@pytest.mark.slow
def test_the_written_config_makes_the_same_run_again(make_config, tmp_path):
    config = make_config(max_steps=2, adapter=AdapterConfig(r=3, target_modules=["att.key"]))
    quiet_train(config)
    command = [sys.executable, "-m", "rwkv_miss", "train", "--config", f"{config.out}/config.yaml"]
    again = tmp_path / "again"
    done = run_process([*command, "--out", str(again)], timeout=120)
    assert done.returncode == 0, done.stderr
    assert losses(again) == losses(config.out)
    assert all(torch.equal(b, adapter(again)[n]) for n, b in adapter(config.out).items())
    assert yaml.safe_load((again / "config.yaml").read_text())["adapter"]["target_modules"] == ["att.key"]


def test_the_adapter_kept_is_the_best_of_the_validations(make_config):
    # So high a rate that later steps make it worse.
    config = make_config(val_split=0.2, val_every=1, lr=0.5, schedule="constant", grad_clip=0.0)
    result = quiet_train(config)
    val = losses(config.out, "val_loss")[1:]
    best = min(range(len(val)), key=val.__getitem__)
    assert result.best_step == best + 1 and best + 1 < len(val)
    model = load_adapter(load_model(config.base), Path(config.out) / "adapter")
    last = torch.load(last_checkpoint(Path(config.out) / "checkpoints")[0], weights_only=False)["state_dict"]
    kept = model.state_dict()
    assert not torch.equal(last["model.blocks.0.att.key.miss_block"], kept["blocks.0.att.key.miss_block"])


def test_epochs_are_full_passes(make_config):
    config = make_config(max_steps=0, epochs=2)  # 29 rows: 4 steps of at most 8
    result = quiet_train(config)
    assert result.steps == 8


@pytest.mark.slow
@pytest.mark.parametrize("strategy, stop", [("auto", 3), ("auto", 4), ("deepspeed_stage_2", 3)])
def test_resume_gives_the_uninterrupted_run(make_config, strategy, stop, tmp_path):
    settings = dict(strategy=strategy, batch_size=4, accumulate=2, val_split=0.1)
    straight = make_config(out=str(tmp_path / "straight"), max_steps=7, schedule="constant", **settings)
    # An epoch has 4 steps: step 3 is in the middle of the first, step 7 in the second.
    first = replace(straight, out=str(tmp_path / "parts"), max_steps=stop)
    for config in (straight, first, replace(first, max_steps=7, resume="auto")):
        done = run_train(config)
        assert done.returncode == 0, done.stderr
    assert losses(first.out) == losses(straight.out)
    assert all(torch.equal(b, adapter(straight.out)[n]) for n, b in adapter(first.out).items())
    assert [p.name for p in (Path(first.out) / "checkpoints").iterdir()] == ["step-00000007"]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["auto", "deepspeed_stage_2", "deepspeed_stage_3"])
def test_a_checkpoint_that_would_run_code_is_refused(make_config, tmp_path, strategy):
    config = make_config(max_steps=1, strategy=strategy)
    assert run_train(config).returncode == 0
    path, _ = last_checkpoint(Path(config.out) / "checkpoints")
    marker = tmp_path / "ran"
    files = [path] if path.is_file() else sorted(path.rglob("*.pt"))
    assert len(files) == (1 if strategy == "auto" else 2)
    for file in files:
        whole = file.read_bytes()
        torch.save({**torch.load(file, weights_only=False), "extra": RunsCode(marker)}, file)
        done = run_train(replace(config, max_steps=2, resume="auto"))
        assert done.returncode == 2 and "nothing was executed" in done.stderr and str(file) in done.stderr, done.stderr
        assert not marker.exists()
        file.write_bytes(whole)
    done = run_train(replace(config, max_steps=2, resume="auto"))
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_sigterm_saves_a_checkpoint_to_go_on_from(make_config, start_process):
    config = make_config(max_steps=100_000, log_every=1)
    process = start_process([sys.executable, "-m", "rwkv_miss", "train", *as_arguments(config)])
    metrics = Path(config.out) / "metrics.csv"
    while process.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") > 3):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 143 and "--resume auto" in stderr and "Traceback" not in stderr
    path, step = last_checkpoint(Path(config.out) / "checkpoints")
    assert torch.load(path, weights_only=False)["global_step"] == step >= 3
    result = quiet_train(replace(config, max_steps=step + 2, resume="auto"))
    assert result.steps == step + 2


def test_a_loss_that_is_not_finite_names_the_module(make_config, tmp_path):
    config = make_config()
    weights = {k: t.clone() for k, t in read_checkpoint(config.base).items()}
    weights["blocks.1.ffn.key.weight"][0, 0] = float("inf")
    broken = tmp_path / "broken.pth"
    write_pth(broken, {k: TensorSpec(t.shape, t.dtype) for k, t in weights.items()}, weights.__getitem__)
    with pytest.raises(
        RunError, match=r"step 1: the loss is (nan|inf).* is blocks\.1\.ffn\.key \(MissLinear, its weight"
    ):
        quiet_train(replace(config, base=str(broken)))
    assert not (Path(config.out) / "adapter").exists()


def test_a_step_that_makes_weights_that_are_not_finite_is_not_saved(make_config, monkeypatch):
    from rwkv_miss.training import lit_module

    config = make_config(max_steps=2, save_every=1)
    before, log_probs, calls = None, lit_module.batch_log_probs, []

    def second_has_no_gradient(*arguments):
        nonlocal before
        loss, state = log_probs(*arguments)
        calls.append(1)
        if len(calls) == 2:
            before = adapter(config.out)
            loss.register_hook(lambda g: g * math.nan)
        return loss, state

    monkeypatch.setattr(lit_module, "batch_log_probs", second_has_no_gradient)
    with pytest.raises(RunError, match=r"^step 2: blocks\.0\.att\.receptance\.miss_block is not finite after the step"):
        quiet_train(config)
    assert last_checkpoint(Path(config.out) / "checkpoints")[1] == 1
    assert all(torch.equal(b, adapter(config.out)[n]) for n, b in before.items())


def test_a_validation_loss_that_is_not_finite_saves_no_adapter(make_config):
    config = make_config(max_steps=1, val_split=0.2, lr=1e30, grad_clip=0.0)
    with pytest.raises(RunError, match=r"^step 1: the validation loss is nan; the adapter of this step is not saved"):
        quiet_train(config)
    assert not (Path(config.out) / "adapter").exists()


def test_a_full_gpu_says_which_step_and_what_to_lower(make_config, monkeypatch):
    from rwkv_miss.training import lit_module

    log_probs, calls = lit_module.batch_log_probs, []

    def third_fails(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")
        return log_probs(*arguments)

    monkeypatch.setattr(lit_module, "batch_log_probs", third_fails)
    with pytest.raises(
        RunError,
        match=r"^step 3: .*2 GiB.*batch_size \(8;.*ctx_len \(64\).*chunk_len or --gradient_checkpointing true$",
    ):
        quiet_train(make_config())


def test_a_folder_with_a_run_is_refused_and_stays_as_it_is(make_config):
    config = make_config(max_steps=1)
    quiet_train(config)
    before = adapter(config.out)
    with pytest.raises(UserError, match=r"holds another run \(adapter, checkpoints.*--resume auto .*--overwrite"):
        quiet_train(replace(config, seed=1))
    assert all(torch.equal(b, adapter(config.out)[n]) for n, b in before.items())


def test_overwrite_replaces_the_run(make_config):
    config = make_config(max_steps=2, val_split=0.2)
    quiet_train(config)
    result = quiet_train(replace(config, max_steps=1, overwrite=True))
    assert result.steps == 1 and len(losses(config.out)) == 1
    assert tree(Path(config.out) / "checkpoints") == {"step-00000001"}


def test_overwrite_removes_what_runs_write_and_nothing_else(make_config):
    config = make_config(max_steps=2)
    quiet_train(config)
    out = Path(config.out)
    kept = [
        out / name for name in ("notes.txt", "adapter/notes.txt", "checkpoints/keep-step-2", "checkpoints/step-2.bak")
    ]
    for path in kept:
        path.write_text("mine")
    quiet_train(replace(config, max_steps=1, overwrite=True))
    assert all(path.read_text() == "mine" for path in kept)
    assert sorted(p.name for p in (out / "checkpoints").glob("step-*")) == ["step-00000001", "step-2.bak"]


@pytest.mark.parametrize("name", ["base", "data"])
def test_overwrite_removes_no_input(make_config, name):
    config = make_config(max_steps=1)
    quiet_train(config)
    inside = Path(config.out) / "tensorboard" / f"events.out.tfevents.x{Path(getattr(config, name)).suffix}"
    shutil.copy(getattr(config, name), inside)
    with pytest.raises(UserError, match=r"x\.\w+: --overwrite true would remove it with .*move it, or give"):
        quiet_train(replace(config, overwrite=True, **{name: str(inside)}))
    assert inside.read_bytes() == Path(getattr(config, name)).read_bytes()


def test_one_run_at_a_time_writes_to_a_folder(make_config):
    config = make_config(max_steps=1)
    with claimed(Path(config.out)), pytest.raises(UserError, match="run: another run is writing to it; wait"):
        quiet_train(config)
    assert not Path(config.out).exists()
    quiet_train(config)
    quiet_train(replace(config, max_steps=2, resume="auto"))


def test_overwrite_loses_nothing_when_the_input_is_wrong(make_config, tmp_path):
    config = make_config(max_steps=1)
    quiet_train(config)
    with pytest.raises(UserError, match="no such file"):
        quiet_train(replace(config, base=str(tmp_path / "missing.pth"), overwrite=True))
    assert (Path(config.out) / "adapter").is_dir()


@pytest.mark.parametrize("changes", [{"wkv_backend": "cuda"}, {"strategy": "deepspeed_stage_2"}])
def test_overwrite_loses_nothing_where_the_run_cannot_start(make_config, monkeypatch, changes):
    config = make_config(max_steps=1)
    quiet_train(config)
    monkeypatch.setitem(sys.modules, "deepspeed", None)  # not installed
    before = tree(Path(config.out))
    with pytest.raises(UserError, match="cannot be"):
        quiet_train(replace(config, overwrite=True, **changes))
    assert tree(Path(config.out)) == before


def test_resume_refuses_other_settings(make_config):
    config = make_config(max_steps=1)
    quiet_train(config)
    kept = Path(config.out, "config.yaml").read_text()
    # lr and weight_decay are restored from the checkpoint: other values would have no effect.
    for name, value in (
        ("ctx_len", 32),
        ("lr", 1.0),
        ("weight_decay", 0.5),
        ("text_field", "q"),
        ("schedule", "wsd"),
    ):
        with pytest.raises(UserError, match=f"cannot resume with other settings: {name} was .*, is {value}$"):
            quiet_train(replace(config, resume="auto", max_steps=2, **{name: value}))
    assert Path(config.out, "config.yaml").read_text() == kept


def test_a_run_that_is_done_may_be_started_again(make_config):
    config = make_config(max_steps=1)
    quiet_train(config)
    before = {path: path.read_bytes() for path in Path(config.out).rglob("*") if path.is_file()}
    said = io.StringIO()
    result = train(replace(config, resume="auto"), Console(file=said, width=300))
    assert "run: the run is done (1 of 1 steps); raise epochs or max_steps to go on" in said.getvalue()
    assert result.steps == 1 and result.warning() is None and not result.validation()
    assert {path: path.read_bytes() for path in Path(config.out).rglob("*") if path.is_file()} == before
    shutil.rmtree(Path(config.out) / "adapter")
    with pytest.raises(UserError, match="It ended before its adapter was saved, which a further step would save"):
        quiet_train(replace(config, resume="auto"))
    quiet_train(replace(config, resume="auto", max_steps=2))
    assert (Path(config.out) / "adapter" / "rwkv_miss.json").is_file()


@pytest.mark.parametrize("stop", [*(pytest.param(n, marks=pytest.mark.slow) for n in (2, 4)), 6])
def test_a_validation_that_did_not_end_is_made_again(make_config, tmp_path, monkeypatch, stop):
    """Also the last one, after which nothing is left to train; and what it would have saved is saved."""
    straight = make_config(val_split=0.2, val_every=2, lr=0.5, schedule="constant", out=str(tmp_path / "straight"))
    quiet_train(straight)
    config = replace(straight, out=str(tmp_path / "parts"))
    validate = LitRWKV.validation_step

    def dies(self, batch, batch_idx):
        if self.trainer.global_step == stop:
            raise KeyError
        validate(self, batch, batch_idx)

    monkeypatch.setattr(LitRWKV, "validation_step", dies)
    with pytest.raises(KeyError):
        quiet_train(config)
    monkeypatch.undo()
    result = quiet_train(replace(config, resume="auto"))
    assert losses(config.out, "val_loss") == losses(straight.out, "val_loss") and len(losses(config.out)) == 6
    for name in ("adapter", "adapter_last"):
        facts = json.loads((Path(config.out) / name / "rwkv_miss.json").read_text())
        assert facts == json.loads((Path(straight.out) / name / "rwkv_miss.json").read_text())
        assert facts["step"] == (result.best_step if name == "adapter" else 6)
        found, expected = (load_file(Path(out) / name / WEIGHTS) for out in (config.out, straight.out))
        assert all(torch.equal(tensor, expected[key]) for key, tensor in found.items())
    assert quiet_train(replace(config, resume="auto")).last_loss is None  # nothing is left to do


def test_a_signal_in_a_validation_ends_the_run_at_once(make_config, tmp_path, monkeypatch):
    straight = make_config(val_split=0.5, val_every=2, batch_size=2, max_steps=4, out=str(tmp_path / "straight"))
    quiet_train(straight)
    config = replace(straight, out=str(tmp_path / "parts"))
    validate, batches = LitRWKV.validation_step, []

    def is_told_to_stop(self, batch, batch_idx):
        validate(self, batch, batch_idx)
        if self.trainer.global_step == 2:
            batches.append(batch_idx)
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(LitRWKV, "validation_step", is_told_to_stop)
    with pytest.raises(Stopped):
        quiet_train(config)
    assert batches == [0]
    monkeypatch.undo()
    quiet_train(replace(config, resume="auto"))
    for column in ("loss", "val_loss"):
        assert losses(config.out, column) == losses(straight.out, column)
    assert all(torch.equal(b, adapter(straight.out)[n]) for n, b in adapter(config.out).items())


def test_a_validation_that_is_made_again_has_one_row(make_config, tmp_path, monkeypatch):
    """If the run was killed after its row was written, and before it was known to have ended."""
    config = make_config(val_split=0.2, max_steps=2)

    def dies(*_):
        raise KeyError

    monkeypatch.setattr(saving, "add_facts", dies)
    with pytest.raises(KeyError):
        quiet_train(config)
    found = losses(config.out, "val_loss")
    monkeypatch.undo()
    quiet_train(replace(config, resume="auto"))
    assert losses(config.out, "val_loss") == found and len(found) == 2


def test_what_a_killed_run_was_writing_is_removed(make_config):
    config = make_config(max_steps=1)
    quiet_train(config)
    out = Path(config.out)
    names = (".metrics.csv.7.part", "adapter/.adapter_model.safetensors.123.part", "checkpoints/.step-00000002.part")
    kept = [out / name for name in ("adapter/.mine.part", ".mine.part", "tensorboard/.a.7.part")]
    for path in (*kept, *(out / name for name in names)):
        path.write_bytes(b"half")
    quiet_train(replace(config, max_steps=2, resume="auto"))
    assert [path for path in out.rglob("*.part")] and set(out.rglob("*.part")) == set(kept)


def test_the_newest_checkpoints_are_kept(make_config):
    config = make_config(save_every=1, keep=3)
    quiet_train(config)
    assert tree(Path(config.out) / "checkpoints") == {f"step-0000000{n}" for n in (4, 5, 6)}


def test_a_resumed_run_drops_what_the_uninterrupted_one_drops(make_config, tmp_path):
    dropping = AdapterConfig(r=4, dropout=0.5)
    straight = make_config(max_steps=4, adapter=dropping, schedule="constant", batch_size=2, accumulate=2)
    first = replace(straight, out=str(tmp_path / "parts"), max_steps=2)
    for config in (straight, first, replace(first, max_steps=4, resume="auto")):
        torch.manual_seed(1)
        quiet_train(config)
    assert losses(first.out) == losses(straight.out)
    assert all(torch.equal(b, adapter(straight.out)[n]) for n, b in adapter(first.out).items())
    other = replace(straight, out=str(tmp_path / "other"), adapter=AdapterConfig(r=4))
    quiet_train(other)
    assert losses(other.out) != losses(straight.out)


def test_resume_refuses_other_data_and_takes_a_copy(make_config, tmp_path):
    config = make_config(max_steps=1)
    quiet_train(config)
    copy, other = (tmp_path / f"{name}{Path(config.data).suffix}" for name in ("copy", "other"))
    text = Path(config.data).read_text()
    copy.write_text(text)
    other.write_text(text.replace("1", "2"))
    with pytest.raises(UserError, match=r"other\.\w+: the checkpoint was trained on other data"):
        quiet_train(replace(config, max_steps=2, resume="auto", data=str(other)))
    assert quiet_train(replace(config, max_steps=2, resume="auto", data=str(copy))).steps == 2


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["auto", "deepspeed_stage_2"])
def test_resume_refuses_another_base(make_config, tmp_path, strategy):
    """In processes of their own: DeepSpeed's process group would stay and occupy the port of later tests."""
    config = make_config(max_steps=1, strategy=strategy)
    assert run_train(config).returncode == 0
    kept = Path(config.out, "config.yaml").read_text()
    weights = dict(read_checkpoint(config.base))
    weights["ln_out.bias"] = weights["ln_out.bias"] + 1
    other, moved = tmp_path / "other.pth", tmp_path / "moved.pth"
    write_pth(other, {k: TensorSpec(t.shape, t.dtype) for k, t in weights.items()}, weights.__getitem__)
    shutil.copy(config.base, moved)
    refused = run_train(replace(config, max_steps=2, resume="auto", base=str(other)))
    assert refused.returncode == 2 and "other.pth: the checkpoint was trained on another base" in refused.stderr
    assert Path(config.out, "config.yaml").read_text() == kept
    assert run_train(replace(config, max_steps=2, resume="auto", base=str(moved))).returncode == 0
    assert last_checkpoint(Path(config.out) / "checkpoints")[1] == 2


def test_a_run_from_before_a_setting_was_there_resumes(make_config):
    config = make_config(max_steps=1)
    quiet_train(config)
    path = Path(config.out) / "config.yaml"
    settings = yaml.safe_load(path.read_text())
    del settings["adapter"]["modules_to_save"], settings["lr_state"]
    path.write_text(yaml.safe_dump(settings))
    assert quiet_train(replace(config, max_steps=2, resume="auto")).steps == 2


@pytest.mark.parametrize("content", [b"", b"a: [b", b"- 1", b"adapter: 1", b"\x80", b"adapter: {}\ndevices: x"])
def test_resume_with_broken_settings(make_config, content):
    config = make_config(max_steps=1)
    quiet_train(config)
    Path(config.out, "config.yaml").write_bytes(content)
    with pytest.raises(UserError, match=r"config\.yaml: (not the settings of a run|is not YAML|is not UTF-8)"):
        quiet_train(replace(config, max_steps=2, resume="auto"))


def test_resume_with_a_truncated_checkpoint(make_config):
    config = make_config(max_steps=1)
    quiet_train(config)
    path, _ = last_checkpoint(Path(config.out) / "checkpoints")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="step-00000001: not a whole checkpoint"):
        quiet_train(replace(config, max_steps=2, resume="auto"))


def test_an_error_leaves_the_terminal_and_the_signals_as_they_were(make_config, monkeypatch):
    monkeypatch.setattr(LitRWKV, "training_step", lambda *_: 1 / 0)
    terminal = io.StringIO()
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(ZeroDivisionError):
        train(make_config(), Console(file=terminal, force_terminal=True))
    hide, show = "\x1b[?25l", "\x1b[?25h"
    assert terminal.getvalue().count(hide) == terminal.getvalue().count(show) == 1
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers


@pytest.mark.parametrize("batch_size, accumulate", [(8, 1), (3, 3)])
def test_tokens_are_those_of_the_documents_and_positions_those_of_the_rows(make_config, batch_size, accumulate):
    """However the rows are split into micro-batches, and although the last step of an epoch has fewer."""
    config = make_config(packing=True, batch_size=batch_size, accumulate=accumulate, max_steps=0, epochs=2)
    said = io.StringIO()
    train(config, Console(file=said))
    [rows] = re.findall(r"in (\d+) rows of 64", said.getvalue())
    lengths = [len(x.ids) - 1 for x in read_documents(config.data, config)]
    assert losses(config.out, "tokens")[-1] == 2 * sum(min(length, 64) for length in lengths)
    assert losses(config.out, "positions")[-1] == 2 * 64 * int(rows) and int(rows) % (batch_size * accumulate)


def test_resume_of_an_empty_folder_starts(make_config):
    assert quiet_train(make_config(max_steps=1, resume="auto")).steps == 1


@pytest.mark.parametrize("val_split", [0.0, 0.2])
def test_a_resume_that_would_go_on_from_nothing_is_refused(make_config, val_split):
    config = make_config(max_steps=1, val_split=val_split)
    quiet_train(config)
    before = adapter(config.out)
    shutil.rmtree(Path(config.out) / "checkpoints")
    with pytest.raises(UserError, match="run: holds adapter/ but no checkpoints/ to go on from"):
        quiet_train(replace(config, resume="auto"))
    assert all(torch.equal(b, adapter(config.out)[n]) for n, b in before.items())
    (Path(config.out) / "checkpoints").mkdir()  # as after a crash in the first save
    assert quiet_train(replace(config, resume="auto")).steps == 1


def test_a_checkpoint_that_was_being_written_is_not_resumed_from(make_config):
    config = make_config(max_steps=2)
    quiet_train(config)
    (Path(config.out) / "checkpoints" / ".step-00000009.part").write_bytes(b"half")
    assert last_checkpoint(Path(config.out) / "checkpoints")[1] == 2
    quiet_train(replace(config, max_steps=3, resume="auto"))
    assert tree(Path(config.out) / "checkpoints") == {"step-00000003"}


def test_rows_of_steps_that_are_done_again_leave_metrics_csv(make_config):
    """As after a crash between two checkpoints: the steps since the last one are run, and logged, again."""
    config = make_config(max_steps=2)
    quiet_train(config)
    metrics = Path(config.out) / "metrics.csv"
    kept = metrics.read_text()
    metrics.write_text(kept + "3,0,999,999,9.9,,0.1,1,1,1,1,1.0\n")
    quiet_train(replace(config, max_steps=3, resume="auto"))
    assert metrics.read_text().startswith(kept) and losses(config.out)[2] != 9.9 and len(losses(config.out)) == 3


def test_every_wrong_setting_is_named_at_once(make_config):
    config = make_config(adapter=AdapterConfig(r=0), lr=-1.0, ctx_len=0, val_every=5, wkv_backend="abacus")
    config = replace(config, seed=2**32, betas=(0.9, 1.0))
    with pytest.raises(UserError) as e:
        quiet_train(config)
    for part in (
        "adapter.r is 0",
        "lr is -1.0",
        "ctx_len is 0",
        "val_every is given",
        "wkv_backend is 'abacus'",
        "seed is 4294967296",
        "betas are",
    ):
        assert part in str(e.value)
    assert not Path(config.out).exists()


@pytest.mark.parametrize(("gpus", "said"), [(1, "1 GPU"), (2, "2 GPUs")])
def test_more_devices_than_gpus(make_config, tmp_path, monkeypatch, gpus, said):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    (tmp_path / "base.pth").write_bytes(b"")
    config = make_config(devices=4, base=str(tmp_path / "base.pth"))  # found before anything is read
    with pytest.raises(UserError, match=f"^devices is 4; this machine has {said}$"):
        quiet_train(config)
    assert not Path(config.out).exists()


def a_disk_that_gets_full() -> None:
    start = Saver.on_train_start

    def limited(*arguments) -> None:
        start(*arguments)
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    Saver.on_train_start = limited


@pytest.mark.slow
def test_the_adapter_survives_a_full_disk(make_config):
    """Writing past a file size limit fails as a full disk does; what was saved before is still whole."""
    config = make_config(max_steps=1)
    quiet_train(config)
    before = Path(config.out, "adapter", "adapter_model.safetensors").read_bytes()
    done = run_train(replace(config, max_steps=2, resume="auto"), before=a_disk_that_gets_full)
    assert done.returncode == 2 and "Traceback" not in done.stderr and "cannot be written" in done.stderr, done.stderr
    assert Path(config.out, "adapter", "adapter_model.safetensors").read_bytes() == before
    assert load_file(Path(config.out, "adapter", "adapter_model.safetensors"))
    assert last_checkpoint(Path(config.out) / "checkpoints")[1] == 1


def test_a_checkpoint_needs_no_folder_for_temporary_files(make_config, monkeypatch):
    def fail(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tempfile, "mkstemp", fail)
    config = make_config(max_steps=1)
    quiet_train(config)
    assert last_checkpoint(Path(config.out) / "checkpoints")[1] == 1


def test_a_checkpoint_on_a_full_disk_ends_the_run_and_leaves_the_last_one(make_config, full_disk):
    config = make_config(max_steps=1, loggers=("csv",), val_split=0.1)
    quiet_train(config)
    folder = Path(config.out) / "checkpoints"
    path, _ = last_checkpoint(folder)
    before = path.read_bytes()
    with full_disk(len(before) - 1), pytest.raises(RunError, match=r"step-00000002: cannot be written: File too large"):
        quiet_train(replace(config, max_steps=2, resume="auto"))
    assert [p.name for p in folder.iterdir()] == [path.name] and path.read_bytes() == before
    assert quiet_train(replace(config, max_steps=2, resume="auto")).steps == 2


def test_a_checkpoint_is_on_the_disk_before_it_gets_its_name(make_config, monkeypatch):
    order = []
    fsync, replace_file = os.fsync, os.replace

    def log_fsync(number: int) -> None:
        order.append(("fsync", Path(os.readlink(f"/proc/self/fd/{number}")).name))
        fsync(number)

    def log_replace(part: Path, path: Path) -> None:
        order.append(("replace", Path(path).name))
        replace_file(part, path)

    monkeypatch.setattr(os, "fsync", log_fsync)
    monkeypatch.setattr(os, "replace", log_replace)
    quiet_train(make_config(max_steps=1))
    assert order.index(("fsync", ".step-00000001.part")) < order.index(("replace", "step-00000001"))


def test_a_run_saves_now_and_then(make_config, monkeypatch):
    """By the clock, also within an epoch: here after every step."""
    config = make_config(max_steps=3, save_minutes=1e-9)
    saved = []
    save = Saver._save
    monkeypatch.setattr(Saver, "_save", lambda self, trainer: (saved.append(trainer.global_step), save(self, trainer)))
    quiet_train(config)
    assert saved == [1, 2, 3]
    saved.clear()
    quiet_train(replace(config, overwrite=True, save_minutes=0.0))
    assert saved == [3]


def test_the_clock_starts_again_when_a_run_has_saved(make_config, monkeypatch):
    """With steps of a minute, and a checkpoint every 2.5 minutes."""
    saved, clock = [], SimpleNamespace(monotonic=lambda: 60.0 * len(steps))
    steps: list = []
    save, end_of_batch = Saver._save, Saver.on_train_batch_end
    monkeypatch.setattr(saving, "time", clock)
    monkeypatch.setattr(Saver, "_save", lambda self, trainer: (saved.append(trainer.global_step), save(self, trainer)))
    monkeypatch.setattr(Saver, "on_train_batch_end", lambda *x: (steps.append(x), end_of_batch(*x)))
    quiet_train(make_config(max_steps=8, epochs=8, save_every=1000, save_minutes=2.5))
    assert saved == [3, 6, 8]


def test_the_learning_rates_are_the_optimizers(make_config):
    config = make_config(adapter=AdapterConfig("state"), lr_state=0.5, max_steps=3, warmup_steps=2, schedule="constant")
    quiet_train(config)
    assert losses(config.out, "lr") == [0.25, 0.5, 0.5]
    both = make_config(adapter=AdapterConfig("miss+state", r=4), lr_state=0.5, max_steps=2, overwrite=True, lr_min=0.5)
    quiet_train(both)
    assert losses(both.out, "lr") == [0.01, 0.0075] and losses(both.out, "lr_state") == [0.5, 0.375]


@pytest.mark.slow
@pytest.mark.parametrize("val_split", [0.0, 0.2])
def test_a_run_that_made_the_model_worse_says_so(make_config, tmp_path, val_split):
    """The base is trained first, so that it has something to lose."""
    first = make_config(max_steps=40, out=str(tmp_path / "first"))
    assert quiet_train(first).warning() is None
    merge(first.base, first.out, tmp_path / "trained.pth")
    config = make_config(base=str(tmp_path / "trained.pth"), val_split=val_split, max_steps=3)
    said = quiet_train(replace(config, lr=100.0, grad_clip=0.0)).warning()
    assert said and "ower lr" in said
    assert ("is above the base's own" if val_split else "is above the first step's") in said
    assert quiet_train(replace(config, lr=1e-3, overwrite=True)).warning() is None
