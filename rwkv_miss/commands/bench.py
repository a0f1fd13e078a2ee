from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from rwkv_miss.errors import UserError


def run(
    what: str = "all", threads: int = 1, json: str | None = None, against: str | None = None, markdown: bool = False
) -> int:
    """Time our kernels and tokenizer against other programs, measure memory, or compare the methods with HF PEFT's.

    Args:
        what: Which benchmark: wkv7, tokenizer, miss (a linear with MiSS beside the linear alone; minutes), head (the
            head with the loss beside computing all logits; minutes), memory (of a training step as its row grows),
            merge (against a plain copy; it writes 9 GB to the folder for temporary files), data (how fast files become
            tokens; it writes 2 GB there; minutes), methods (how far what they compute is from what HF PEFT does), quant
            (memory of quantised bases; it writes 3 GB), serving (requests of many adapters in one batch beside those of
            one; minutes), step (of training, beside its matrix products alone and rwkv7-hf + HF PEFT; minutes, 11 GB
            of memory), packing (tokens that carry loss in a second, beside padded rows; minutes), generate (beside the
            rwkv package; minutes), start (of a run, until its first step; minutes), short (ratios that any CPU has, in
            seconds), launches (the kernels that a training step launches on a GPU and the bytes that they move,
            counted without one), fits (which model fits on which GPU; minutes), or all (of those that take seconds).
        threads: CPU threads that every program gets.
        json: File to write the figures to as well, with what the machine is.
        against: What `--what short --json` wrote: the command fails if one of its ratios is 1.5 times as large now.
        markdown: Print the tables as Markdown, as docs/performance.md has them.
    """
    from rwkv_miss.benchmarks.short import check_short
    from rwkv_miss.benchmarks.table import run_benchmarks, write_figures

    if against is not None and what != "short":
        raise UserError(f"bench: against is for --what short, but what is {what}")
    tables = []
    for table in run_benchmarks(what, threads) if against is None else [check_short(Path(against))]:
        tables.append(table)
        columns = list(dict.fromkeys(key for row in table.rows for key in row))
        names = [column.replace("_", " ") for column in columns]
        rows = [[_shown(row.get(column, "")) for column in columns] for row in table.rows]
        if markdown:
            print(table.title, "", *(f"| {' | '.join(x)} |" for x in (names, ["---"] * len(names), *rows)), sep="\n")
            continue
        shown = Table(*names, title=table.title)
        for cells in rows:
            shown.add_row(*cells)
        Console(markup=False).print(shown)
    if json is not None:
        write_figures(Path(json), threads, tables)
    return 0


def _shown(x: Any) -> str:
    if not isinstance(x, float):
        return str(x)
    return f"{x:.2f}" if abs(x) >= 0.005 else f"{x:.0e}" if x else "0"
