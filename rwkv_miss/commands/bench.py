from __future__ import annotations

from rich.console import Console
from rich.table import Table


def run(what: str = "all", threads: int = 1) -> int:
    """Time our kernels and tokenizer against other programs, or measure the memory of a training step or a merge.

    Args:
        what: Which benchmark: wkv7, tokenizer, miss (a linear with MiSS against the linear alone), memory (of a
            training step as its row grows), merge (against a plain copy; it writes 9 GB to the folder for temporary
            files), or all (of those that take seconds; the last three take minutes).
        threads: CPU threads that every program gets.
    """
    from rwkv_miss.benchmarks.table import run_benchmarks

    for table in run_benchmarks(what, threads):
        columns = list(dict.fromkeys(key for row in table.rows for key in row))
        shown = Table(*(column.replace("_", " ") for column in columns), title=table.title)
        for row in table.rows:
            cells = (row.get(column, "") for column in columns)
            shown.add_row(*(f"{x:.2f}" if isinstance(x, float) else str(x) for x in cells))
        Console(markup=False).print(shown)
    return 0
