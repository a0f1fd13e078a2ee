from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from rwkv_miss.config import PlanConfig


def run(config: PlanConfig) -> int:
    """Tell how much memory a run takes, before anything is loaded: the options are those of train."""
    from rwkv_miss.planning.report import plan

    found = plan(config)
    if config.json:
        print(json.dumps(asdict(found)))
        return 0
    console = Console(markup=False)
    on_cpu = config.wkv_backend == "cpu"
    table = Table(found.title, "each process" if on_cpu else "each GPU", *([] if on_cpu else ["each machine"]))
    rows: list[Any] = [*found.rows, ("all", found.device, found.host)]
    for name, *sizes in rows:
        cells = [f"{size / 2**30:,.2f} GiB" if size else "" for size in sizes]
        table.add_row(name, *cells[: 1 if on_cpu else 2])
    console.print(table)
    for line in found.lines:
        console.print(line, highlight=False, soft_wrap=True)
    return 0
