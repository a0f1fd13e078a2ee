"""Runs that are killed at a random moment and then resumed, each in a process forked from this one, which has imported
everything but has not computed anything (a fork after that would hang).

Usage: python -m tests.training.on_killed SETTINGS.json TRIALS
Runs the settings once to OUT/straight, and TRIALS times, each killed once, to OUT/killed-0, ...
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from rwkv_miss.config import AdapterConfig, TrainConfig
from rwkv_miss.training import run  # noqa: F401, imports all that a run needs
from rwkv_miss.training.checks import last_checkpoint
from rwkv_miss.training.start import train


def start(config: TrainConfig) -> int:
    """Trains in a new process; returns its id."""
    if number := os.fork():
        return number
    try:
        train(config, Console(quiet=True))
    except BaseException as e:
        print(f"{config.out}: {e!r}", file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


def wait_for_step(out: Path, step: int, number: int) -> None:
    """Waits for the checkpoint of that step, unless the process ends before; for step 0, for the run's folder."""
    while not (out.exists() if step == 0 else (found := last_checkpoint(out / "checkpoints")) and found[1] >= step):
        if os.waitid(os.P_PID, number, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return
        time.sleep(0.001)


def main(settings: str, trials: str) -> None:
    options = json.loads(Path(settings).read_text())
    config = TrainConfig(**options | {"adapter": AdapterConfig(**options["adapter"])})
    assert os.waitpid(start(replace(config, out=f"{config.out}/straight")), 0)[1] == 0
    chance = random.Random(0)
    for i in range(int(trials)):
        trial = replace(config, out=f"{config.out}/killed-{i}", resume="auto")
        number = start(trial)
        wait_for_step(Path(trial.out), chance.randrange(config.max_steps), number)
        time.sleep(chance.uniform(0, 0.3))  # a step takes about a tenth of a second
        os.kill(number, signal.SIGKILL)
        was_killed = os.waitpid(number, 0)[1] == signal.SIGKILL
        found = sorted(path.name for path in Path(trial.out).glob("checkpoints/*"))
        print(f"trial {i}: {'killed' if was_killed else 'had ended'} with {found}", flush=True)
        assert os.waitpid(start(trial), 0)[1] == 0


if __name__ == "__main__":
    main(*sys.argv[1:])
