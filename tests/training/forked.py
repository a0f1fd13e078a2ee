"""Training in processes that are forked from one that has imported everything: to import it takes longer than most runs
of the tests. How a command starts its processes is tested in test_start.py, test_failure.py and test_saved.py."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tests.processes import free_port

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["tests.training.imported"])


def run_forked(
    arguments: Sequence[str], processes: int = 1, before: Callable[[], object] | None = None, timeout: float = 300
) -> subprocess.CompletedProcess:
    """Runs `rwkv-miss` with these arguments in `processes` ranks; after `timeout` seconds they are killed and
    TimeoutExpired raised.

    Args:
        before: a function of a module, which each process calls first.

    Returns:
        What all have printed, and the first exit status that is not 0.
    """
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, name) for name in ("stdout", "stderr")]
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": str(processes)}
        environments = [meeting | {"LOCAL_RANK": str(rank)} if processes > 1 else {} for rank in range(processes)]
        ranks = [_FORKS.Process(target=_run, args=(arguments, x, before, files)) for x in environments]
        end = time.monotonic() + timeout
        try:
            for rank in ranks:
                rank.start()
            for rank in ranks:
                rank.join(max(0, end - time.monotonic()))
            stdout, stderr = (file.read_text() for file in files)
            statuses = [rank.exitcode for rank in ranks]
            if None in statuses:
                raise subprocess.TimeoutExpired(arguments, timeout, stdout, stderr)
            return subprocess.CompletedProcess(arguments, next(filter(None, statuses), 0), stdout, stderr)
        finally:
            for rank in ranks:
                if rank.is_alive():
                    rank.kill()
                    rank.join()


def _run(
    arguments: Sequence[str], environment: Mapping[str, str], before: Callable[[], object] | None, files: Sequence[Path]
) -> None:
    for number, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.update(environment)
    from rwkv_miss.cli import main

    if before is not None:
        before()
    sys.exit(main(arguments))
