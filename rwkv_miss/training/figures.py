"""What a run has written row by row, read again: metrics.csv and samples.jsonl. Without torch."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from rwkv_miss.errors import UserError


def read_figures(path: Path) -> list[dict[str, str]]:
    """The rows of a metrics.csv by column, as text; none if there is no such file.

    Raises:
        UserError: it is not what a run writes.
    """
    lines = list(csv.reader(_whole_lines(path)))
    if not lines:
        return []
    columns, rows = lines[0], lines[1:]
    if "step" not in columns or len(set(columns)) < len(columns):
        raise _damaged(path, 1, f"the columns are {','.join(columns)[:80]!r}, without a column step or with one twice")
    for number, row in enumerate(rows, start=2):
        if len(row) != len(columns):
            raise _damaged(path, number, f"{len(row)} values for {len(columns)} columns")
        found = dict(zip(columns, row, strict=True))
        if not found["step"].isdecimal():
            raise _damaged(path, number, f"the step is {found['step'][:80]!r}")
        for name, text in found.items():
            if text and not _is_number(text):
                raise _damaged(path, number, f"{name} is {text[:80]!r}, which is no number")
    return [dict(zip(columns, row, strict=True)) for row in rows]


def read_samples(path: Path) -> list[dict[str, Any]]:
    """The lines of a samples.jsonl; none if there is no such file.

    Raises:
        UserError: it is not what a run writes.
    """
    found = []
    for number, line in enumerate(_whole_lines(path), start=1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or type(row.get("step")) is not int:
            raise _damaged(path, number, f"{line[:80].strip()!r} is no sample of a run")
        found.append(row)
    return found


def _whole_lines(path: Path) -> list[str]:
    """The lines of a text file. The last one is left out if it has no end: it was being written when the disk was full
    or the machine stopped."""
    if path.is_dir():
        raise UserError(f"{path}: is a folder; a run writes a file there. Move it, or start anew with another out")
    if not path.exists():
        return []
    try:
        text = path.read_bytes().decode()
    except UnicodeDecodeError as e:
        raise _damaged(path, e.object[: e.start].count(b"\n") + 1, "not UTF-8") from None
    lines = text.split("\n")[:-1]
    for number, line in enumerate(lines, start=1):
        if "\0" in line:
            raise _damaged(path, number, "it holds NUL characters")
    return [line.removesuffix("\r") for line in lines]


def _damaged(path: Path, line: int, why: str) -> UserError:
    return UserError(f"{path}: line {line}: {why}; mend or move the file, or start anew with --overwrite true")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
