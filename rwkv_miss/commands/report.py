from __future__ import annotations

from pathlib import Path


def run(file: str) -> int:
    """Make report.html of a run's folder once more, such as while the run goes on.

    Args:
        file: The folder that was given to train as --out.
    """
    from rwkv_miss.training.report import write_report

    print(write_report(Path(file)))
    return 0
