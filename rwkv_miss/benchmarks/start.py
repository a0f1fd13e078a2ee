"""Times the command `train` from its start to the end of its first step."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rwkv_miss.benchmarks.common import Table, write_random_base
from rwkv_miss.errors import RunError

SIZES = (12, 768)
"""n_layer and n_embd of the base: those of 0.1B."""
ROUNDS = 7
RECORDS = 1000
_GOAL = 6.0
_IMPORTS = "import gc, os; gc.disable(); import rwkv_miss.cli, rwkv_miss.training.run; os._exit(0)"


def bench_start(thread_count: int) -> Table:
    """A run of MiSS on `RECORDS` questions and answers with a bf16 RWKV-7 of random weights and the World vocabulary,
    one row of 512 tokens a step, whose files, tokens and compiled code are in the caches.

    Returns:
        A table with a row for each part: name; seconds, the median of `ROUNDS`, seconds_min and seconds_max. The parts
        are told apart by what the run prints, and by a process that imports what the run does. The last row is
        the whole, with its goal.
    """
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_random_base(folder / "base.pth", *SIZES)
        records = ({"question": f"What is {i} + 2? " * 8, "answer": f"It is {i + 2}. " * 20} for i in range(RECORDS))
        (folder / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        for i in range(ROUNDS + 1):
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", _IMPORTS], check=True)
            imports = time.perf_counter() - start
            introduced, stepped = _run(folder, thread_count)
            if i > 0:  # the first round fills the caches
                parts = {"imports": imports, "settings, data, base": introduced - imports}
                parts |= {"trainer, first step": stepped - introduced, "all": stepped}
                for name, seconds in parts.items():
                    found.setdefault(name, []).append(seconds)
    rows: list[dict] = [
        {"name": name, "seconds": statistics.median(x), "seconds_min": min(x), "seconds_max": max(x)}
        for name, x in found.items()
    ]
    rows[-1]["goal"] = _GOAL
    n_layer, n_embd = SIZES
    title = f"From the command to its first step: RWKV-7, {n_layer} layers of {n_embd}, bf16, {ROUNDS} rounds"
    return Table(f"{title}, {thread_count} thread(s)", rows)


def _run(folder: Path, thread_count: int) -> tuple[float, float]:
    """The seconds from the start of the command until it says what it trains, and until its first step is done."""
    options = {"base": folder / "base.pth", "data": folder / "data.jsonl", "out": folder / "out", "tokenizer": "world"}
    options |= {"max_steps": 1, "log_every": 1, "ctx_len": 512, "batch_size": 1, "overwrite": "true"}
    # The command takes its threads from OMP_NUM_THREADS, which only env can set for it.
    command = ["env", f"OMP_NUM_THREADS={thread_count}", sys.executable, "-u", "-m", "rwkv_miss", "train"]
    command += [word for name, value in options.items() for word in (f"--{name}", str(value))]
    seen: dict[str, float] = {}
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        for line in process.stdout:
            seen.setdefault(line.split()[0], time.perf_counter() - start)
        errors = process.stderr.read()
    if process.returncode or "step" not in seen:
        raise RunError(f"bench: the run has failed: {errors}")
    return min(seen.values()), seen["step"]
