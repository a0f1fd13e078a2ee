"""Helpers of the tests of whole runs."""

from __future__ import annotations

import csv
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from safetensors.torch import load_file

from rwkv_miss.config import AdapterConfig, TrainConfig
from rwkv_miss.training.result import TrainResult
from rwkv_miss.training.start import train
from tests.processes import run_process
from tests.training.forked import run_forked


def small_config(base: Path, data: Path, out: Path) -> TrainConfig:
    """6 steps of 8 rows, in one micro-batch."""
    return TrainConfig(
        base=str(base),
        data=str(data),
        tokenizer="bytes",
        out=str(out),
        adapter=AdapterConfig(r=4),
        packing=False,
        ctx_len=64,
        allow_dropping=True,  # most of the answers are longer
        batch_size=8,
        max_steps=6,
        lr=1e-2,
        grad_clip=2.5,  # the norms are 4.2, 3.0, 2.4, ...: with a gradient of another scale other steps are clipped
        log_every=1,
    )


def quiet_train(config: TrainConfig) -> TrainResult:
    return train(config, Console(quiet=True))


def run_train(config: TrainConfig, before: Callable[[], object] | None = None) -> subprocess.CompletedProcess:
    """`rwkv-miss train` in processes of its own: for several ranks, and for DeepSpeed, whose process group stays.

    Args:
        before: as for `run_forked`.
    """
    return run_forked(["train", *as_arguments(config)], config.devices, before)


def run_command(config: TrainConfig) -> subprocess.CompletedProcess:
    """`run_train` as a user starts it, which takes longer."""
    return run_process([sys.executable, "-m", "rwkv_miss", "train", *as_arguments(config)], timeout=300)


def resumes_to_the_same_run(config: TrainConfig, out: Path) -> None:
    """Makes a run that is there, of 4 steps, once more into `out`: stopped after 2 and resumed, all is the same."""
    first = replace(config, out=str(out), max_steps=2)
    quiet_train(first)
    quiet_train(replace(first, max_steps=4, resume="auto"))
    assert losses(out) == losses(config.out)
    assert all(torch.equal(tensor, adapter(out)[name]) for name, tensor in adapter(config.out).items())


def losses(out: str | Path, column: str = "loss") -> list[float]:
    with (Path(out) / "metrics.csv").open(newline="") as f:
        return [float(row[column]) for row in csv.DictReader(f) if row[column]]


def adapter(out: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(out) / "adapter" / "adapter_model.safetensors")


def as_arguments(config: TrainConfig) -> list[str]:
    """The command line's options for the settings in `config`."""
    found = []
    for name, value in vars(config).items():
        if name == "adapter":
            lists = {k: f"[{','.join(v)}]" if isinstance(v, list) else v for k, v in vars(value).items()}
            found += [f"--adapter.{k}={v}" for k, v in lists.items() if v is not None]
        elif name == "betas":
            found += ["--betas", f"[{value[0]},{value[1]}]"]
        elif value is not None:
            found += [f"--{name}", str(value).lower() if isinstance(value, bool) else str(value)]
    return found
