"""report.html: what became of a run, on one page that holds all it shows, and needs neither a network nor a script."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

from rwkv_miss.config import TrainConfig
from rwkv_miss.errors import UserError
from rwkv_miss.files import atomic_write
from rwkv_miss.training.charts import Line, chart
from rwkv_miss.training.checks import read_settings
from rwkv_miss.training.figures import read_figures, read_samples
from rwkv_miss.training.page import page, pairs, table, text, tile
from rwkv_miss.training.result import TrainResult

# Answers to a prompt that are shown at once, the newest ones; those between the first and these are folded away.
_NEWEST = 3


def write_report(out: Path) -> Path:
    """Makes `out`/report.html of what a run has left in `out` so far: metrics.csv, config.yaml, and run.json and
    samples.jsonl where they are.

    Returns:
        The path of the report.

    Raises:
        UserError: there is no run, one of the files is damaged, or the report cannot be written.
    """
    if not (out / "config.yaml").is_file():
        raise UserError(f"{out}: holds no run (there is no config.yaml); give the folder that was a run's --out")
    settings = read_settings(out / "config.yaml")
    rows = read_figures(out / "metrics.csv")
    samples = read_samples(out / "samples.jsonl")
    facts = _read_facts(out / "run.json")
    path = out / "report.html"
    with atomic_write(path) as part:
        part.write_text(_page(out.resolve().name, settings, rows, samples, facts), encoding="utf-8", errors="replace")
    return path


def _read_facts(path: Path) -> dict[str, Any]:
    """run.json; empty for a run from before it was written."""
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict):
        raise UserError(f"{path}: not the facts of a run; remove the file")
    return found


def _page(
    name: str,
    settings: Mapping[str, Any],
    rows: Sequence[Mapping[str, str]],
    samples: Sequence[Mapping[str, Any]],
    facts: Mapping[str, Any],
) -> str:
    columns = {column: _column(rows, column) for column in (rows[0] if rows else ())}
    result = _result(columns)
    body = [
        f"<header><h1>{text(name)}</h1>",
        *(f"<p>{text(line)}</p>" for line in facts.get("trained", ())),
        _status(result, facts),
        f'<p class="warning">{text(warning)}</p>' if (warning := result.warning()) else "",
        f"</header>\n<section class=tiles>{_tiles(result, columns)}</section>\n",
        f"<section class=charts>{_charts(columns)}</section>\n",
        _samples(samples),
        _settings(settings),
        table("Machine", facts.get("machine", {})),
        f"<section><h2>Command</h2><pre>{text(facts['command'])}</pre></section>\n" if "command" in facts else "",
    ]
    return page(name, "".join(body))


def _column(rows: Sequence[Mapping[str, str]], column: str) -> list[tuple[float, float]]:
    """(step, figure) of the rows that have a figure in that column."""
    return [(float(row["step"]), float(row[column])) for row in rows if row.get(column)]


def _result(columns: Mapping[str, list[tuple[float, float]]]) -> TrainResult:
    """The run's result so far, as its metrics have it."""
    losses, validations = columns.get("loss", []), columns.get("val_loss", [])
    base = [loss for step, loss in validations if step == 0]
    later = [(loss, step) for step, loss in validations if step > 0]
    best, best_step = min(later, default=(None, 0))
    return TrainResult(
        int(max((step for points in columns.values() for step, _ in points), default=0)),
        losses[0][1] if losses else None,
        losses[-1][1] if losses else None,
        base[0] if base else None,
        best,
        int(best_step),
    )


def _status(result: TrainResult, facts: Mapping[str, Any]) -> str:
    total = facts.get("total_steps")
    steps = f"{result.steps:,} of {total:,} steps" if total else f"{result.steps:,} steps"
    kind, said = "good", f"{steps} done"
    if facts.get("error"):
        kind, said = "bad", f"{steps}: {facts['error']}"
    elif facts.get("signal"):
        kind, said = "", f"{steps}; stopped by {facts['signal']}, after a checkpoint"
    elif "ended" not in facts:
        kind, said = "", f"{steps}; the run goes on, or was killed"
    when = " to ".join(str(facts[key]).replace("T", " ") for key in ("started", "ended") if facts.get(key))
    return f'<p class="status {kind}">{text(said)}</p><p class="when">{text(when)}</p>'


def _tiles(result: TrainResult, columns: Mapping[str, list[tuple[float, float]]]) -> str:
    """The run in a few numbers."""
    found = []
    if result.first_loss is not None:
        found.append(("training loss", f"{result.first_loss:.4f} \u2192 {result.last_loss:.4f}", "first and last step"))
    if result.best_val_loss is not None:
        before = f"{result.base_val_loss:.4f} \u2192 " if result.base_val_loss is not None else ""
        found.append(("validation loss", f"{before}{result.best_val_loss:.4f}", f"best, at step {result.best_step:,}"))
    if speeds := columns.get("tokens_per_s"):
        found.append(("speed", f"{statistics.median(y for _, y in speeds):,.0f} tokens/s", "median, without padding"))
    if tokens := columns.get("tokens"):
        found.append(("trained on", f"{tokens[-1][1]:,.0f} tokens", "without padding"))
    if memory := columns.get("memory_mb"):
        found.append(("memory", f"{max(y for _, y in memory) / 1000:,.2f} GB", "the most in one process"))
    if seconds := columns.get("seconds"):
        found.append(("time", str(timedelta(seconds=round(_duration([y for _, y in seconds])))), "of training"))
    return "".join(tile(*figure) for figure in found)


def _duration(seconds: Sequence[float]) -> float:
    """The time of all processes that one after the other have worked at a run: each counts from 0."""
    ends = [a for a, b in pairwise(seconds) if b < a]
    return sum(ends) + seconds[-1]


def _charts(columns: Mapping[str, list[tuple[float, float]]]) -> str:
    def line(column: str, name: str) -> Line:
        return Line(name, columns.get(column, []))

    speeds = [line("tokens_per_s", "tokens")]
    if columns.get("positions_per_s") != columns.get("tokens_per_s"):
        speeds.append(line("positions_per_s", "with padding"))
    found = [chart("Loss", [line("loss", "training"), line("val_loss", "validation")], from_zero=False, wide=True)]
    for column in columns:
        if column == "lr" or column.startswith("lr_"):
            found.append(chart(f"Learning rate{column[2:].replace('_', ', ', 1)}", [line(column, column)]))
    found.append(chart("Gradient norm, before clipping", [line("grad_norm", "norm")]))
    found.append(chart("Tokens per second", speeds))
    found.append(chart("Peak memory, MB", [line("memory_mb", "the most in one process")]))
    return "".join(found)


def _samples(samples: Sequence[Mapping[str, Any]]) -> str:
    """The answers to each prompt, the newest last."""
    by_prompt: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for sample in samples:
        by_prompt.setdefault((sample.get("prompt", ""), sample.get("expected", "")), []).append(sample)
    cards = []
    for (prompt, expected), answers in by_prompt.items():
        shown = [_answer(sample, expected) for sample in answers]
        folded = shown[1:-_NEWEST]
        if folded:
            between = f"<details><summary>{len(folded)} more</summary>{''.join(folded)}</details>"
            shown = [shown[0], between, *shown[-_NEWEST:]]
        cards.append(
            f"<article><pre>{text(prompt.strip())}</pre>{''.join(shown)}"
            f'<div class="answer data"><small>data</small><pre>{text(expected.strip())}</pre></div></article>'
        )
    return f"<section><h2>Samples</h2><div class=samples>{''.join(cards)}</div></section>\n" if cards else ""


def _answer(sample: Mapping[str, Any], expected: str) -> str:
    answer = str(sample.get("answer", "")).strip()
    right = " right" if answer == expected.strip() else ""
    said = text(answer) or "(nothing)"
    return f'<div class="answer{right}"><small>step {sample["step"]:,}</small><pre>{said}</pre></div>'


def _settings(settings: Mapping[str, Any]) -> str:
    """Those that are not the defaults, and, folded away, all the others."""
    changed, rest = told_apart(settings)
    return (
        f"<section><h2>Settings</h2>{pairs(changed)}"
        f"<details><summary>{len(rest)} more, which have their defaults</summary>{pairs(rest)}</details></section>\n"
    )


def told_apart(settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings by the names of their options: those that are not the defaults, and the others."""
    given, defaults = _flat(settings), _flat(asdict(TrainConfig(base="", data="", tokenizer="", out="")))
    changed = {name: value for name, value in given.items() if value != defaults.get(name)}
    return changed, {name: value for name, value in given.items() if name not in changed}


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings by the names of their options, with lists for tuples as in YAML."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        inner = {f"{name}.{key}": x for key, x in value.items()} if isinstance(value, Mapping) else {name: value}
        found |= {key: list(x) if isinstance(x, tuple) else x for key, x in inner.items()}
    return found
