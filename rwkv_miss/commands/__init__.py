"""The commands of the command line, one file each, and their table. A command's options and their help are
its function's arguments and docstring; the function only calls the package and prints. Importing this imports no torch:
each command imports what it needs when it is run."""

from __future__ import annotations

from collections.abc import Callable

from rwkv_miss.commands import (
    bench,
    convert,
    data_binidx,
    doctor,
    evaluate,
    export,
    generate,
    info,
    init,
    merge,
    plan,
    preview,
    report,
    train,
)

COMMANDS: dict[str, Callable[..., int]] = {
    "init": init.run,
    "data binidx": data_binidx.run,
    "train": train.run,
    "plan": plan.run,
    "preview": preview.run,
    "report": report.run,
    "merge": merge.run,
    "export": export.run,
    "convert": convert.run,
    "eval": evaluate.run,
    "generate": generate.run,
    "info": info.run,
    "doctor": doctor.run,
    "bench": bench.run,
}
"""What follows `rwkv-miss`, and the function that returns the exit status. A command of two words is one of a group."""
GROUPS = {"data": "Prepare training data."}
"""The help of each first word of commands of two words."""
