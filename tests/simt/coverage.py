"""Which lines of the .cu and .cuh files ran: build with `OPTIONS`, launch, then ask `lines_run`."""

from __future__ import annotations

import ctypes
import json
import subprocess
from pathlib import Path

OPTIONS = ("-O0", "--coverage", "-DSIMT_COVERAGE")


def lines_run(library: ctypes.CDLL) -> dict[tuple[str, int], bool]:
    """For every line with code, by (file name, line number): whether it has run, in any instance of its template."""
    library.simt_write_coverage()
    path = Path(library._name)
    data = next(path.parent.glob(f"{path.name}-*.gcda"))
    command = ["gcov", "--json-format", "--stdout", str(data)]
    report = json.loads(subprocess.run(command, capture_output=True, check=True, cwd=path.parent).stdout)
    ran: dict[tuple[str, int], bool] = {}
    for file in report["files"]:
        if file["file"].endswith((".cu", ".cuh")):
            for line in file["lines"]:
                place = Path(file["file"]).name, line["line_number"]
                ran[place] = ran.get(place, False) or line["count"] > 0
    return ran
