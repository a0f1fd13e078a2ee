"""Line charts as HTML and SVG that need no script. Lines are stretched to the width of the page; the labels of the axes
are text of the page, so that they are as readable on a phone as on a screen."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

Points = list[tuple[float, float]]
Place = Callable[[float, float], tuple[float, float]]
"""(x, y) of a point -> its place in the drawing."""

# More points than this are drawn as the means of so many stretches, on a band from the least to the most of each.
_MOST_POINTS = 400
# With no more points than this each has a dot, which shows its numbers under the mouse.
_MOST_DOTS = 60
# An axis that need not include 0 is logarithmic if the greatest number is more than this many times the least.
_MUCH = 50
_SIZE = 1000  # of the drawing, in both directions, before it is stretched


@dataclass(frozen=True)
class Line:
    """A name for the legend and the points, (x, y) in the order of x. A y that is not finite leaves a gap."""

    name: str
    points: Points


def chart(title: str, lines: Sequence[Line], *, from_zero: bool = True, wide: bool = False) -> str:
    """A figure of one line or two, over optimizer steps. Lines without a finite point are left out; empty text if no
    line has one.

    Args:
        from_zero: the y axis includes 0; otherwise it is logarithmic where the numbers differ much.
        wide: the figure has a row of the page for itself.
    """
    lines = [line for line in lines if any(math.isfinite(y) for _, y in line.points)]
    if not lines:
        return ""
    ys = [y for line in lines for _, y in line.points if math.isfinite(y)]
    xs = [x for line in lines for x, _ in line.points]
    if logarithmic := not from_zero and 0 < _MUCH * min(ys) < max(ys):
        title += ", logarithmic"
        powers = range(math.floor(math.log10(min(ys))), math.ceil(math.log10(max(ys))) + 1)
        y_ticks = [10.0**power for power in powers]
        y_labels = [f"{y:g}" for y in y_ticks]
    else:
        y_ticks = _ticks(min([*ys, 0] if from_zero else ys), max([*ys, 0] if from_zero else ys))
        y_labels = _labels(y_ticks)
    scale = math.log10 if logarithmic else float
    left, right = (min(xs), max(xs)) if min(xs) < max(xs) else (min(xs) - 1, max(xs) + 1)
    x_ticks = [x for x in _ticks(left, right, whole=True) if left <= x <= right]
    bottom, top = scale(y_ticks[0]), scale(y_ticks[-1])

    def place(x: float, y: float) -> tuple[float, float]:
        return _SIZE * (x - left) / (right - left), _SIZE * (top - scale(y)) / (top - bottom)

    grid = "".join(f"M0 {place(left, y)[1]:.1f}H{_SIZE}" for y in y_ticks)
    drawn = "".join(_draw(line, i, place) for i, line in enumerate(lines))
    gutter = max(map(len, [*y_labels, "step"]))
    sides = "".join(
        f'<span style="top:{place(left, y)[1] / _SIZE:.2%}">{text}</span>'
        for y, text in zip(y_ticks, y_labels, strict=True)
    )
    thousands = max(x_ticks) >= 10_000 and all(x % 1000 == 0 for x in x_ticks)
    x_labels = [f"{x / 1000:,.0f}k" if thousands and x else f"{x:,.0f}" for x in x_ticks]
    feet = "".join(_foot(place(x, y_ticks[0])[0] / _SIZE, text) for x, text in zip(x_ticks, x_labels, strict=True))
    names = [line.name for line in lines] if len(lines) > 1 else []
    legend = "".join(f'<span class="key s{i}">{escape(name)}</span>' for i, name in enumerate(names))
    return (
        f'<figure class="chart{" wide" if wide else ""}"><figcaption><b>{escape(title)}</b> {legend}</figcaption>'
        f'<div class="plot" style="--gutter:{gutter}ch"><div class="sides">{sides}</div>'
        f'<svg viewBox="0 0 {_SIZE} {_SIZE}" preserveAspectRatio="none" role="img" aria-label="{escape(title)}">'
        f'<path class="grid" d="{grid}"/>{drawn}</svg>'
        f'<div class="unit">step</div><div class="feet">{feet}</div></div></figure>\n'
    )


def _draw(line: Line, index: int, place: Place) -> str:
    """One line of a chart as SVG."""
    if len(line.points) > _MOST_POINTS:
        means, low, high = _summary(line.points)
        outline = [place(*p) for p in high] + [place(*p) for p in reversed(low)]
        band = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in outline) + "Z"
        return f'<path class="band s{index}" d="{band}"/>{_stroke(means, index, place)}'
    drawn = _stroke(line.points, index, place)
    if len(line.points) <= _MOST_DOTS:
        for x, y in line.points:
            if math.isfinite(y):
                at, height = place(x, y)
                said = escape(f"{line.name}, step {x:,.0f}: {y:.6g}")
                drawn += f'<path class="dot s{index}" d="M{at:.1f} {height:.1f}h.01"><title>{said}</title></path>'
    return drawn


def _stroke(points: Points, index: int, place: Place) -> str:
    path, pen = "", "M"
    for x, y in points:
        if math.isfinite(y):
            at, height = place(x, y)
            path += f"{pen}{at:.1f} {height:.1f}"
            pen = "L"
        else:
            pen = "M"
    return f'<path class="line s{index}" d="{path}"/>'


def _summary(points: Points) -> tuple[Points, Points, Points]:
    """The means, the least and the greatest of equal stretches of many points, leaving out what is not finite."""
    means, low, high = [], [], []
    for i in range(_MOST_POINTS):
        part = points[i * len(points) // _MOST_POINTS : (i + 1) * len(points) // _MOST_POINTS]
        ys = [y for _, y in part if math.isfinite(y)]
        if ys:
            x = sum(x for x, _ in part) / len(part)
            means.append((x, sum(ys) / len(ys)))
            low.append((x, min(ys)))
            high.append((x, max(ys)))
    return means, low, high


def _ticks(low: float, high: float, whole: bool = False) -> list[float]:
    """Some round numbers at equal distances, of which the first is not above `low` and the last not below `high`.
    `whole`: integers."""
    if low == high:
        low, high = low - abs(low or 1) / 2, high + abs(high or 1) / 2
    raw = (high - low) / (4 if whole else 5)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    if whole:
        step = max(1, math.ceil(step))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [step * i for i in range(first, last + 1)]


def _labels(ticks: Sequence[float]) -> list[str]:
    """The numbers as text, all with the digits that tell them apart."""
    step, largest = ticks[1] - ticks[0], max(map(abs, ticks))
    if largest < 1e-3 or largest >= 1e7:
        return ["0" if abs(t) < step / 2 else f"{t:.2g}".replace("e-0", "e-").replace("e+0", "e") for t in ticks]
    digits = next(d for d in range(12) if abs(round(step, d) - step) < step * 1e-6)
    return ["0" if t == 0 else f"{t:,.{digits}f}" for t in ticks]


def _foot(share: float, text: str) -> str:
    """A label below the x axis; those at the ends stay within the chart."""
    shift = 0 if share < 0.04 else -100 if share > 0.96 else -50
    return f'<span style="left:{share:.2%};transform:translateX({shift}%)">{text}</span>'
