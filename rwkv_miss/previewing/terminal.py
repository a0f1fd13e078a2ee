"""A preview in a terminal or a file: legible without colour, since each line begins with a mark of what it is."""

from __future__ import annotations

import math

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rwkv_miss.config import PreviewConfig
from rwkv_miss.previewing.found import Piece, Preview, Shown
from rwkv_miss.previewing.showing import shorten, visible
from rwkv_miss.previewing.words import LENGTH_COLUMNS, facts, length_cells, title
from rwkv_miss.training.progress import printable

# The marks and the colours of what is learned, of what is not, and of what is cut off.
_LEARNED, _GIVEN, _CUT = ("+", "green"), (" ", ""), ("x", "red")
_LEGEND = "+ learned  x cut off by ctx_len  ⏎ line break  · space  → tab  ∎ end, token 0"
_PICTURES = r"[⏎·→∎␀-␡]|<U\+[0-9A-F]{4,6}>"
# Characters of a stretch of text that are shown: its beginning and its end.
_SHOWN = 1500
_BAR = 40


def print_preview(found: Preview, config: PreviewConfig, console: Console) -> None:
    """Prints the records, the figures, and last what deserves a look."""
    if found.shown:
        _say(Text(_LEGEND), console)
    for number, shown in enumerate(found.shown, start=1):
        _say(Text(printable(f"\n{title(shown, number)}"), style="bold"), console)
        _print_record(shown, config.token_ids, console)
    console.print()
    _print_facts(found, config, console)
    console.print(_histogram(found))
    console.print(_lengths(found))
    for warning in found.warnings:
        _say(Text(printable(f"look at this: {warning}"), style="bold yellow"), console)


def _say(text: Text, console: Console) -> None:
    """Prints a paragraph: in a file it is one line, whatever its length."""
    console.print(text, soft_wrap=not console.is_terminal)


def _print_record(shown: Shown, token_ids: bool, console: Console) -> None:
    line: Text | None = None
    last = _GIVEN
    for piece in shown.pieces:
        kind = _kind(piece)
        if line is not None and kind != last:
            _print_line(line, last, console)
            line = None
        last = kind
        for i, text in enumerate(_text(piece).split("\n")):
            if i and line is not None:
                _print_line(line, kind, console)
                line = None
            if text:
                line = (line or Text()).append(text)
        if token_ids:
            if line is not None:
                _print_line(line, kind, console)
                line = None
            _print_line(Text(" ".join(map(str, piece.ids))), ("#", "dim"), console)
    if line is not None:
        _print_line(line, last, console)


def _kind(piece: Piece) -> tuple[str, str]:
    return _CUT if piece.is_cut else _LEARNED if piece.learned else _GIVEN


def _text(piece: Piece) -> str:
    if piece.is_end:
        return "∎"
    begin, left_out, end = shorten(piece.text, _SHOWN)
    between = f"\n[... {left_out:,} characters ...]\n" if left_out else ""
    return visible(begin) + between + visible(end)


def _print_line(text: Text, kind: tuple[str, str], console: Console) -> None:
    """A line behind its mark; in a terminal, as many as it takes."""
    mark, style = kind
    text.stylize(style)
    text.highlight_regex(_PICTURES, "cyan")
    lines = text.wrap(console, max(console.width - 3, 10)) if console.is_terminal else [text]
    for line in lines:
        console.print(Text.assemble((f"{mark}│ ", style or "dim"), line), soft_wrap=True)


def _print_facts(found: Preview, config: PreviewConfig, console: Console) -> None:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, said in facts(found, config).items():
        grid.add_row(name, Text(printable(said)))
    console.print(grid)


def _histogram(found: Preview) -> Table:
    table = Table("tokens", "records", "", box=box.SIMPLE_HEAD)
    table.columns[0].justify = table.columns[1].justify = "right"
    most = max(count for _, count in found.histogram)
    for i, (at_most, count) in enumerate(found.histogram):
        least = at_most // 2 + 1 if at_most > 1 else 0
        name = f"{least:,} to {at_most:,}" if i or least > 1 else f"up to {at_most:,}"
        table.add_row(name, f"{count:,}", Text("█" * math.ceil(_BAR * count / most), style="blue"))
    return table


def _lengths(found: Preview) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("", *LENGTH_COLUMNS):
        table.add_column(name, justify="right")
    for at in found.lengths:
        is_now = at.ctx_len == found.ctx_len
        table.add_row("now" if is_now else "", *length_cells(at), style="bold" if is_now else "")
    return table
