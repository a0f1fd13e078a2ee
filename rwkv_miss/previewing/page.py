"""A preview as one page that holds all it shows, and needs neither a network nor a script."""

from __future__ import annotations

import re
from pathlib import Path

from rwkv_miss.config import PreviewConfig
from rwkv_miss.errors import UserError
from rwkv_miss.files import atomic_write, check_name
from rwkv_miss.previewing.found import Piece, Preview, Shown
from rwkv_miss.previewing.showing import shorten, visible
from rwkv_miss.previewing.words import LENGTH_COLUMNS, facts, length_cells, title
from rwkv_miss.training.page import page, table, text, tile

# Characters of a stretch of text that are shown: its beginning and its end.
_SHOWN = 20_000


def check_page(path: Path, overwrite: bool) -> None:
    """Raises UserError if the page cannot be written there."""
    check_name(path, "a page")
    if path.is_dir():
        raise UserError(f"{path}: is a folder; give the name of the page's file as html")
    if path.exists() and not overwrite:
        raise UserError(f"{path}: exists already; give another name as html, or --overwrite true")


def write_page(path: Path, found: Preview, config: PreviewConfig) -> None:
    """Writes the page, whole or not at all.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as part:
            part.write_text(_page(found, config), encoding="utf-8", errors="replace")
    except OSError as e:
        raise UserError(f"{path}: cannot be written: {e.strerror or e}") from e


def _page(found: Preview, config: PreviewConfig) -> str:
    now = found.now
    tiles = [
        ("records", f"{found.records:,}", "all" if found.is_all else "the first ones"),
        ("tokens", f"{found.tokens:,}", f"{found.loss_tokens:,} with loss"),
        (f"at ctx_len {now.ctx_len:,}", f"{now.truncated:,} cut", f"{now.dropped:,} dropped"),
        ("rows", f"{found.fill:.1%} filled", "packed" if found.packing else "one document in each"),
        ("copies", f"{found.copies.count:,}", f"{found.several_answers.count:,} have other answers"),
        ("steps", f"{found.steps:,}", f"{found.steps_an_epoch:,} an epoch"),
    ]
    body = [
        f"<header><h1>{text(found.data)}</h1><p>as the model will see it</p>",
        *(f'<p class="warning">{text(warning)}</p>' for warning in found.warnings),
        f"</header>\n<section class=tiles>{''.join(tile(*figure) for figure in tiles)}</section>\n",
        "<section><h2>Records</h2><p class=legend><mark>learned</mark> carries loss, <span>the rest</span> is given, "
        "<del>cut off</del> is never seen; ⏎ line break, · space, → tab, ∎ end (token 0)</p>"
        f"{''.join(_record(shown, i, config.token_ids) for i, shown in enumerate(found.shown, start=1))}</section>\n"
        if found.shown
        else "",
        table("Figures", facts(found, config)),
        f"<section><h2>Tokens of a record</h2><div class=bars>{_bars(found)}</div></section>\n",
        f"<section><h2>At other lengths</h2><div class=wide-table>{_lengths(found)}</div></section>\n",
    ]
    return page(f"{found.data}: preview", "".join(body), _STYLE)


def _record(shown: Shown, number: int, token_ids: bool) -> str:
    pieces = "".join(_piece(piece) for piece in shown.pieces)
    ids = " ".join(str(token) for piece in shown.pieces for token in piece.ids)
    told = f"<details><summary>token ids</summary><pre>{ids}</pre></details>" if token_ids else ""
    return f"<article><small>{text(title(shown, number))}</small><pre class=seen>{pieces}</pre>{told}</article>"


def _piece(piece: Piece) -> str:
    tag = "del" if piece.is_cut else "mark" if piece.learned else "span"
    begin, left_out, end = shorten(piece.text, _SHOWN)
    between = f"<i>[... {left_out:,} characters ...]</i>" if left_out else ""
    shown = "<i>∎</i>" if piece.is_end else f"{_visible(begin)}{between}{_visible(end)}"
    return f"<{tag}>{shown}</{tag}>"


def _visible(part: str) -> str:
    return re.sub(r"[⏎·→␀-␡]|&lt;U\+[0-9A-F]{4,6}&gt;", r"<i>\g<0></i>", text(visible(part)))


def _bars(found: Preview) -> str:
    most = max(count for _, count in found.histogram)
    return "".join(
        f'<span>up to {at_most:,}</span><div><div style="width:{count / most:.1%}"></div></div><span>{count:,}</span>'
        for at_most, count in found.histogram
    )


def _lengths(found: Preview) -> str:
    rows = []
    for at in found.lengths:
        now = " class=now" if at.ctx_len == found.ctx_len else ""
        rows.append(f"<tr{now}>{''.join(f'<td>{cell}</td>' for cell in length_cells(at))}</tr>")
    return f"<table><tr>{''.join(f'<th>{head}</th>' for head in LENGTH_COLUMNS)}</tr>{''.join(rows)}</table>"


_STYLE = """
.tiles { grid-template-columns: repeat(auto-fit, minmax(min(100%, 128px), 1fr)); }
.legend { color: var(--soft); font-size: 13px; margin-bottom: 10px; }
article { margin-bottom: 12px; }
article > pre.seen { color: var(--soft); max-height: 40em; margin: 6px 0 0; }
mark { background: color-mix(in srgb, var(--good) 18%, transparent); color: var(--ink);
  border-bottom: 2px solid var(--good); }
del { color: var(--bad); text-decoration-color: color-mix(in srgb, var(--bad) 45%, transparent); }
i { font-style: normal; opacity: .65; }
.bars { display: grid; grid-template-columns: max-content 1fr max-content; gap: 4px 12px; font-size: 13px;
  font-variant-numeric: tabular-nums; }
.bars > span { text-align: right; color: var(--soft); }
.bars div div { background: var(--s0); height: 100%; border-radius: 0 4px 4px 0; }
.wide-table { overflow-x: auto; }
table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; white-space: nowrap; }
th { color: var(--soft); font-weight: 500; font-size: 13px; }
th, td { text-align: right; padding: 4px 14px; border-bottom: 1px solid var(--edge); }
.now { font-weight: 700; background: color-mix(in srgb, var(--s0) 12%, transparent); }
.bars, table { background: var(--card); }
.bars { border: 1px solid var(--edge); border-radius: 10px; padding: 12px 14px; }
"""
