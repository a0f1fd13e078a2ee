"""A page that holds all it shows, and needs neither a network nor a script: its frame, and what its parts have in
common."""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from typing import Any

from rwkv_miss.training.progress import printable


def page(title: str, body: str, style: str = "") -> str:
    """The whole page as HTML.

    Args:
        body: HTML of what the page shows.
        style: CSS beside what all pages have.
    """
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # Nothing is loaded, whatever the data hold.
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
        'img-src data:"><link rel="icon" href="data:,">\n'
        f"<title>{text(title)}</title>\n<style>{_STYLE}{style}</style></head>\n"
        f"<body><main>\n{body}</main></body></html>\n"
    )


def text(value: Any) -> str:
    """Anything as text of the page."""
    return escape(printable(str(value)))


def tile(name: str, value: str, what: str) -> str:
    """A figure that is seen at once, between its name and what it is."""
    return f"<div><small>{text(name)}</small><b>{text(value)}</b><small>{text(what)}</small></div>"


def table(title: str, values: Mapping[str, Any]) -> str:
    """A section of names and their values; empty text if there are none."""
    return f"<section><h2>{text(title)}</h2>{pairs(values)}</section>\n" if values else ""


def pairs(values: Mapping[str, Any]) -> str:
    """Names and their values, as they are written in YAML."""
    return f"<dl>{''.join(f'<dt>{text(k)}</dt><dd>{text(_value(v))}</dd>' for k, v in values.items())}</dl>"


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


_STYLE = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #fff; --ink: #1c2330; --soft: #667085; --edge: #e3e6ec;
  --s0: #2563eb; --s1: #e8590c; --good: #12805c; --bad: #c92a2a; }
@media (prefers-color-scheme: dark) { :root { --page: #12151b; --card: #1b1f27; --ink: #e6e9ef; --soft: #98a2b3;
  --edge: #2d333f; --s0: #6ea8fe; --s1: #ffa94d; --good: #51cf9a; --bad: #ff8787; } }
* { box-sizing: border-box; margin: 0; }
body { background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
main { max-width: 1160px; margin: 0 auto; padding: 24px 16px 48px; }
h1 { font-size: 26px; line-height: 1.25; margin-bottom: 8px; }
h2 { font-size: 18px; margin: 32px 0 12px; }
header p, small, .when { color: var(--soft); }
.status { color: var(--ink); font-weight: 600; margin-top: 12px; }
.status::before { content: "\\25cf"; color: var(--soft); margin-right: 8px; }
.good::before { color: var(--good); }
.bad::before { color: var(--bad); }
.warning { border-left: 4px solid var(--s1); padding: 4px 12px; margin-top: 12px; color: var(--ink); }
.tiles, .charts, .samples { display: grid; gap: 12px; margin-top: 20px; }
.tiles { grid-template-columns: repeat(auto-fit, minmax(min(100%, 150px), 1fr)); }
.charts { grid-template-columns: repeat(auto-fit, minmax(min(100%, max(340px, 50% - 6px)), 1fr)); }
.samples { grid-template-columns: repeat(auto-fit, minmax(min(100%, 480px), 1fr)); margin-top: 0; }
.tiles > div, .chart, article, dl, section > pre { background: var(--card); border: 1px solid var(--edge);
  border-radius: 10px; padding: 12px 14px; min-width: 0; }
.tiles b { display: block; font-size: 15px; font-variant-numeric: tabular-nums; }
.wide { grid-column: 1 / -1; }
figcaption { display: flex; flex-wrap: wrap; gap: 2px 16px; margin-bottom: 12px; }
.key { color: var(--soft); font-size: 13px; }
.key::before { content: ""; display: inline-block; width: 14px; height: 3px; border-radius: 2px; margin-right: 6px;
  vertical-align: middle; background: var(--color); }
.s0 { --color: var(--s0); }
.s1 { --color: var(--s1); }
.plot { display: grid; grid-template: 180px 24px / var(--gutter) 1fr; gap: 0 10px; font-size: 12px; color: var(--soft);
  font-variant-numeric: tabular-nums; }
.wide .plot { grid-template-rows: 260px 24px; }
.sides, .feet { position: relative; }
.unit { white-space: nowrap; text-align: right; padding-top: 6px; }
.sides span, .feet span { position: absolute; white-space: nowrap; }
.sides span { right: 0; transform: translateY(-50%); }
.feet span { top: 6px; }
svg { width: 100%; height: 100%; overflow: visible; }
path { fill: none; stroke: var(--color); stroke-width: 2; stroke-linejoin: round; stroke-linecap: round;
  vector-effect: non-scaling-stroke; }
.grid { stroke: var(--edge); stroke-width: 1; }
.dot { stroke-width: 6; }
.band { fill: var(--color); stroke: none; opacity: .2; }
pre { font: 13px/1.45 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
article > pre { color: var(--soft); max-height: 12em; overflow: auto; margin-bottom: 8px; }
.answer { display: grid; grid-template-columns: minmax(88px, max-content) 1fr; gap: 8px; padding: 6px 0;
  border-top: 1px solid var(--edge); }
.right pre { color: var(--good); }
.answer small { white-space: nowrap; }
.data { border-top-style: dashed; }
details { padding: 6px 0; }
summary { cursor: pointer; color: var(--soft); font-size: 13px; margin-bottom: 6px; }
dl { display: grid; grid-template-columns: minmax(90px, max-content) 1fr; gap: 4px 20px; font-size: 14px; }
dt { color: var(--soft); }
dd { font-variant-numeric: tabular-nums; white-space: pre-wrap; }
@media (max-width: 480px) { dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: 6px; } }
"""
