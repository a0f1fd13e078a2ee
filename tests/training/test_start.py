"""Mistakes that are found before anything heavy is imported, and how the processes of a run find each other."""

from __future__ import annotations

import gc
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from lightning.fabric.plugins.environments import SLURMEnvironment

from rwkv_miss.config import AdapterConfig, TrainConfig
from rwkv_miss.errors import UserError
from rwkv_miss.training import strategies
from rwkv_miss.training.checks import check_run
from rwkv_miss.training.start import train
from rwkv_miss.training.watch import Watch
from tests.processes import free_port, run_process
from tests.training.runs import adapter, as_arguments, losses, quiet_train

TRAIN = [sys.executable, "-m", "rwkv_miss", "train"]
LAUNCHER = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "TORCHELASTIC_RUN_ID", "SLURM_NTASKS")


@pytest.fixture
def start(start_process) -> Callable[..., subprocess.Popen]:
    """`start(config, **environment)` starts a training command, without any launcher's variables."""

    def one(config: TrainConfig, **environment: str) -> subprocess.Popen:
        env = {k: v for k, v in os.environ.items() if k not in LAUNCHER} | environment
        return start_process([*TRAIN, *as_arguments(config)], env=env)

    return one


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"base": "none.pth"}, "none.pth: no such file (checkpoint)"),
        ({"base": "BlinkDL/rwkv-7-world"}, "the name of a model on a hub, download its .pth"),
        ({"lr": -1.0, "adapter": AdapterConfig("lora", r=0)}, "lr is -1.0; it must be above 0; adapter.r is 0"),
        ({"objective": "dpo"}, "objective is 'dpo'; there are cross_entropy"),
        ({"out": "/proc/run"}, "/proc/run: cannot be written in /proc"),
        ({"num_nodes": 2}, "MASTER_ADDR"),
    ],
)
def test_a_mistake_is_found_before_torch_is_imported(make_config, changes, said):
    config = make_config(**changes)
    code = (
        "import sys\nfrom rwkv_miss.cli import main\nstatus = main(sys.argv[1:])\n"
        "print('heavy:', *sorted({'torch', 'lightning'} & set(sys.modules)))\nsys.exit(status)\n"
    )
    environment = {k: v for k, v in os.environ.items() if k not in LAUNCHER}
    command = [sys.executable, "-c", code, "train", *as_arguments(config)]
    done = run_process(command, timeout=60, env=environment)
    assert done.returncode == 2 and said in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stdout == "heavy:\n"


def test_a_folder_that_cannot_be_written(make_config, tmp_path, monkeypatch):
    def refuse(dir):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(UserError, match=rf"run: cannot be written in {tmp_path}: Permission denied; give another out"):
        check_run(make_config())


@pytest.mark.parametrize("collects", [True, False])
def test_the_garbage_collector_is_left_as_it_was(make_config, monkeypatch, collects):
    monkeypatch.setattr("rwkv_miss.training.run.run", lambda *_: gc.isenabled())
    (gc.enable if collects else gc.disable)()
    try:
        assert train(make_config()) is collects is gc.isenabled()
    finally:
        gc.enable()


def test_a_folder_of_hugging_face_is_no_base(make_config, tmp_path):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"hf: is a folder; .* Hugging Face model's: give the .pth in BlinkDL's layout"):
        check_run(make_config(base=str(tmp_path / "hf")))


def test_several_machines_need_to_be_told_where_they_meet(make_config, monkeypatch):
    config = make_config(num_nodes=2)
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match=r"is 2, but the environment lacks MASTER_ADDR .*, MASTER_PORT .*, NODE_RANK "):
        check_run(config)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    with pytest.raises(UserError, match=r"is 2, but the environment lacks NODE_RANK \(0 on the first machine"):
        check_run(config)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_run(config)


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "8"}, r"torchrun has started 8 processes \(WORLD_SIZE\)"),
        ({"CROSS_RANK": "0", "WORLD_SIZE": "2"}, r"deepspeed has started 2 processes \(WORLD_SIZE\)"),
        ({"SLURM_NTASKS": "1"}, r"SLURM has started 1 processes \(SLURM_NTASKS\)"),
    ],
)
def test_a_launcher_starts_as_many_processes_as_the_settings_say(make_config, monkeypatch, environment, said):
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=rf"^{said}, but devices 2 x num_nodes 2 is 4; make them equal$"):
        check_run(make_config(devices=2, num_nodes=2))


def test_a_shell_of_slurm_is_no_launcher(make_config, monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "1")
    monkeypatch.setenv("SLURM_JOB_NAME", "interactive")
    check_run(make_config(devices=2))


@pytest.mark.parametrize("devices", [1, 2])
def test_slurm_s_signal_is_left_to_the_run(make_config, monkeypatch, devices):
    """Lightning would save a checkpoint of its own and put the job into the queue again."""
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)
    told = {"SLURM_NTASKS": str(devices), "SLURM_NTASKS_PER_NODE": str(devices), "SLURM_JOB_NAME": "train"}
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    _, plugins = strategies.build(make_config(devices=devices), False, Watch(1))
    [environment] = [plugin for plugin in plugins if isinstance(plugin, SLURMEnvironment)]
    assert not environment.auto_requeue
    monkeypatch.setenv("SLURM_JOB_NAME", "interactive")
    _, plugins = strategies.build(make_config(devices=devices), False, Watch(1))
    assert not any(isinstance(plugin, SLURMEnvironment) for plugin in plugins)


@pytest.mark.slow
@pytest.mark.parametrize(
    "rank, said", [("0", r"rank 1, of NODE_RANK 1; start the same command there"), ("1", "NODE_RANK 0")]
)
def test_a_machine_that_does_not_come_is_named(make_config, start, rank, said):
    config = make_config(num_nodes=2, meet_minutes=0.05)
    process = start(config, MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port(), NODE_RANK=rank)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 1 and "Traceback" not in stderr, stderr
    assert re.search(said, stderr) and "0.05 minutes" in stderr
    assert not Path(config.out).exists()


@pytest.mark.slow
def test_two_machines_give_the_run_of_one(make_config, start, tmp_path):
    """Two groups of processes on this machine, started as they would be on two machines."""
    one = make_config(max_steps=2)
    quiet_train(one)
    two = replace(one, out=str(tmp_path / "two"), num_nodes=2, batch_size=4)
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    processes = [start(two, **meeting, NODE_RANK=str(rank)) for rank in range(2)]
    said = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert losses(two.out) == pytest.approx(losses(one.out), rel=2e-5)
    assert "2 steps done" in said[0][0] and "steps" not in said[1][0]


@pytest.mark.slow
def test_several_processes_speak_once(make_config, start):
    config = make_config(devices=2, batch_size=4, max_steps=1)
    stdout, stderr = start(config).communicate(timeout=300)
    assert stdout.count("1 steps done") == 1 and stdout.count("parameters frozen") == 1, stdout
    assert stderr.count("using backend 'cpu'") == 1, stderr


@pytest.mark.slow
def test_ctrl_c_before_the_first_step_is_one_line(make_config, start):
    config = make_config()
    for seconds in (0.6, 1.2, 1.8, 2.4):  # while the command line, torch or lightning is imported
        process = start(config)
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
        said = stderr in ("rwkv-miss: interrupted\n", "rwkv-miss train: interrupted\n")
        # If the interrupt passed through an exec(), Python ends by the signal itself, which a shell reports as 130 too.
        assert said and process.returncode in (130, -signal.SIGINT), (seconds, process.returncode, stderr)
    assert not Path(config.out).exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1, signal.SIGINT])
def test_signals_save_a_checkpoint(make_config, start, number):
    config = make_config(max_steps=100_000)
    process = start(config)
    metrics = Path(config.out) / "metrics.csv"
    while process.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") > 3):
        time.sleep(0.05)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "--resume auto" in stderr and "Traceback" not in stderr
    [checkpoint] = (Path(config.out) / "checkpoints").iterdir()
    assert adapter(config.out) and int(checkpoint.name.removeprefix("step-")) >= 3


@pytest.mark.slow
def test_a_terminal_that_is_closed_saves_a_checkpoint(make_config, start_process):
    """The run's progress bar is on that terminal: writing to it fails once it is closed."""
    config = make_config(max_steps=100_000)
    master, slave = os.openpty()
    process = start_process([*TRAIN, *as_arguments(config)], stdin=slave, stdout=slave, stderr=slave)
    os.close(slave)
    metrics = Path(config.out) / "metrics.csv"
    while process.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") > 3):
        os.read(master, 65536)
    os.close(master)  # the kernel sends SIGHUP if it is the controlling terminal; it is not, so we do
    time.sleep(0.3)
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=60) == 128 + signal.SIGHUP
    assert len(list((Path(config.out) / "checkpoints").iterdir())) == 1
