"""Small inline SVG charts. Colours come from the page's CSS variables, so that they follow light and dark; text is
text.

Every chart has one viewBox of 400 x 290 units and is meant to be shown 340 to 560 pixels wide, where its labels are
legible.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

WIDTH, HEIGHT = 400, 290
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 14, 44
CHARACTER = 6.7  # mean advance of the label font at its size of 12 units
SERIES = 7
"""Number of colours; beyond it colours repeat with another marker and dash."""
CONTROL = -1
"""The series of controls: grey, whatever else the page shows."""
DASHES = ("", "6 3", "2 3")

Format = Callable[[float], str]


@dataclass(frozen=True, kw_only=True)
class Point:
    """A point of a scatter chart; ``low`` and ``high`` draw a whisker; ``hollow`` marks what is not comparable."""

    x: float
    y: float
    label: str
    series: int
    low: float | None = None
    high: float | None = None
    hollow: bool = False


@dataclass(frozen=True, kw_only=True)
class Line:
    """A curve of a line chart."""

    points: Sequence[tuple[float, float]]
    label: str
    series: int


@dataclass(frozen=True, kw_only=True)
class Trend:
    """A curve of few measured points, each with a marker; ``hollow`` marks those that are not comparable."""

    points: Sequence[tuple[float, float]]
    hollow: Sequence[bool]
    label: str
    series: int


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A row of a forest chart: an interval around a value."""

    label: str
    value: float
    low: float
    high: float
    series: int


def colour(series: int) -> str:
    """Return the CSS colour of a series."""
    return "var(--control)" if series == CONTROL else f"var(--s{series % SERIES})"


def compact(value: float) -> str:
    """Format a count shortly: 1.5 M, 38.4 k, 4.6e13 as 46 T."""
    for size, unit in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            scaled = value / size
            return f"{scaled:.0f} {unit}" if scaled >= 100 else f"{scaled:.3g} {unit}"
    return f"{value:.3g}"


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return about ``count`` round values within [low, high]: steps of 1, 2, 2.5 or 5 times a power of ten."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = min((m * power for m in (1, 2, 2.5, 5, 10)), key=lambda s: abs((high - low) / s - count))
    first = math.ceil(low / step - 1e-9)
    values = [round((first + n) * step, 12) for n in range(int((high - low) / step) + 2)]
    return [v for v in values if v <= high + step * 1e-9]


class _Axes:
    """Maps data to the plot's area and draws grid, ticks and axis titles."""

    def __init__(self, xs: Sequence[float], ys: Sequence[float], pad_x: float = 0.08, pad_y: float = 0.12) -> None:
        self.x0, self.x1 = _padded(xs, pad_x)
        self.y0, self.y1 = _padded(ys, pad_y)

    def x(self, value: float) -> float:
        return LEFT + (value - self.x0) / (self.x1 - self.x0) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self.y0) / (self.y1 - self.y0) * (HEIGHT - TOP - BOTTOM)

    def draw(
        self, x_title: str, y_title: str, x_text: Format, y_text: Format, x_marks: Sequence[float] | None = None
    ) -> str:
        parts = []
        for value in ticks(self.y0, self.y1):
            y = self.y(value)
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(_text(LEFT - 6, y + 3.5, y_text(value), "tick", "end"))
        for value in ticks(self.x0, self.x1, 4) if x_marks is None else x_marks:
            x = self.x(value)
            parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
            parts.append(_text(x, HEIGHT - BOTTOM + 14, x_text(value), "tick", "middle"))
        middle = (HEIGHT - BOTTOM + TOP) / 2
        parts.append(_text((WIDTH + LEFT - RIGHT) / 2, HEIGHT - 8, x_title, "axis", "middle"))
        parts.append(
            f'<text class="axis" text-anchor="middle" transform="translate(11 {middle:.0f}) rotate(-90)">'
            f"{escape(y_title)}</text>"
        )
        return "".join(parts)


def _padded(values: Sequence[float], share: float) -> tuple[float, float]:
    low, high = min(values), max(values)
    pad = (high - low) * share or abs(high) * 0.1 or 1.0
    floor = 0.0 if low >= 0 else -math.inf  # a chart of counts does not begin below nought
    return max(low - pad, floor), high + pad


def _text(x: float, y: float, text: str, kind: str, anchor: str = "start") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(body: str, title: str, height: float = HEIGHT) -> str:
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(title, quote=True)}">'
        f"<title>{escape(title)}</title>{body}</svg>"
    )


def _marker(x: float, y: float, series: int, hollow: bool) -> str:
    fill = "var(--card)" if hollow else colour(series)
    style = f'fill="{fill}" stroke="{colour(series)}" stroke-width="2"'
    shape = max(series, 0) // SERIES % 3
    if shape == 1:
        return f'<rect x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8" {style}/>'
    if shape == 2:
        return f'<path d="M{x:.1f} {y - 5:.1f}l5 9h-10z" {style}/>'
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.6" {style}/>'


def scatter(points: Sequence[Point], x_title: str, y_title: str, y_text: Format, title: str) -> str:
    """Draw labelled points; labels avoid each other, the points and the frame."""
    if len(points) < 2:  # one point says nothing about a trade-off
        return ""
    lows = [p.low for p in points if p.low is not None]
    highs = [p.high for p in points if p.high is not None]
    axes = _Axes([p.x for p in points], [*(p.y for p in points), *lows, *highs], pad_x=0.14)
    body = [axes.draw(x_title, y_title, compact, y_text)]
    taken = [(axes.x(p.x) - 6, axes.y(p.y) - 6, axes.x(p.x) + 6, axes.y(p.y) + 6) for p in points]
    for p in points:
        if p.low is not None and p.high is not None:
            x, y1, y2 = axes.x(p.x), axes.y(p.low), axes.y(p.high)
            body.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{y1:.1f}" y2="{y2:.1f}" stroke="{colour(p.series)}"/>')
    for p in points:
        x, y = axes.x(p.x), axes.y(p.y)
        tip = f"{p.label}: {y_text(p.y)} at {compact(p.x)}"
        body.append(f"<g>{_marker(x, y, p.series, p.hollow)}<title>{escape(tip)}</title></g>")
    for p in sorted(points, key=lambda p: p.y, reverse=True):
        body.append(_label(axes.x(p.x), axes.y(p.y), p.label, taken))
    return _svg("".join(body), title)


def _label(x: float, y: float, label: str, taken: list[tuple[float, float, float, float]]) -> str:
    """Place a label where it covers least: beside, above or below its point, further away if need be."""
    width, height = len(label) * CHARACTER, 12.0
    best: tuple[float, float, float] | None = None
    for distance in (9.0, 20.0, 33.0, 47.0):
        up, down = y - distance, y + distance + height - 3
        beside = [(x + 9, y + 4), (x - 9 - width, y + 4)] if distance == 9.0 else []
        over = [(x - width / 2, up), (x - width / 2, down), (x + 2, up), (x + 2, down), (x - width - 2, up)]
        for left, base in [*beside, *over, (x - width - 2, down)]:
            box = (left, base - height + 2, left + width, base + 2)
            cost = sum(_overlap(box, other) for other in taken) + 4 * _outside(box) + distance
            if best is None or cost < best[0] - 1e-9:
                best = (cost, left, base)
    assert best is not None
    _, left, base = best
    taken.append((left, base - height + 2, left + width, base + 2))
    near_x, near_y = min(max(x, left), left + width), min(max(y, base - height + 2), base + 2)
    leader = ""
    if math.hypot(near_x - x, near_y - y) > 12:
        leader = f'<line class="leader" x1="{x:.1f}" y1="{y:.1f}" x2="{near_x:.1f}" y2="{near_y:.1f}"/>'
    if left + width < x:  # the width is an estimate: its error goes away from the point
        return leader + _text(left + width, base, label, "label", "end")
    return leader + f'<text class="label" x="{left:.1f}" y="{base:.1f}">{escape(label)}</text>'


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def _outside(box: tuple[float, float, float, float]) -> float:
    over = (
        max(0.0, LEFT - box[0]) + max(0.0, box[2] - WIDTH + 2) + max(0.0, -box[1]) + max(0.0, box[3] - HEIGHT + BOTTOM)
    )
    return over * 20


def lines(curves: Sequence[Line], x_title: str, y_title: str, title: str) -> str:
    """Draw curves over samples or steps: the smoothed curve, and the raw one faintly behind it."""
    curves = [curve for curve in curves if len(curve.points) > 1]
    if not curves:
        return ""
    every = [y for curve in curves for _, y in curve.points]
    ordered = sorted(every)
    ceiling = ordered[int(0.995 * (len(ordered) - 1))]  # one exploding step must not flatten the rest
    axes = _Axes([x for c in curves for x, _ in c.points], [min(y, ceiling) for y in every], pad_x=0.0, pad_y=0.06)
    body = [axes.draw(x_title, y_title, compact, compact)]
    for curve in curves:
        points = _thin(curve.points)
        dash = DASHES[max(curve.series, 0) // SERIES % len(DASHES)]
        stroke = f'fill="none" stroke="{colour(curve.series)}" stroke-linejoin="round"'
        body.append(f'<path d="{_path(axes, points)}" {stroke} stroke-width="1" opacity=".28"/>')
        tip = f"<title>{escape(curve.label)}</title>"
        dashed = f' stroke-dasharray="{dash}"' if dash else ""
        body.append(f'<path d="{_path(axes, _smooth(points))}" {stroke} stroke-width="2"{dashed}>{tip}</path>')
    return _svg("".join(body), title)


def trends(
    curves: Sequence[Trend],
    x_title: str,
    y_title: str,
    y_text: Format,
    title: str,
    level: float | None = None,
    level_label: str = "",
) -> str:
    """Draw measured points joined by straight lines over a logarithmic x axis, and a dashed line at ``level``. A curve
    of one point is its marker."""
    flat = [point for curve in curves for point in curve.points if point[0] > 0]
    if not flat:
        return ""
    axes = _Axes([math.log2(x) for x, _ in flat], [*(y for _, y in flat), *([] if level is None else [level])])
    low, high = math.ceil(axes.x0), math.floor(axes.x1)
    marks = list(range(low, high + 1, max(1, (high - low + 1) // 6)))
    body = [axes.draw(x_title, y_title, lambda v: compact(2.0**v), y_text, marks)]
    taken = [(axes.x(math.log2(x)) - 6, axes.y(y) - 6, axes.x(math.log2(x)) + 6, axes.y(y) + 6) for x, y in flat]
    if level is not None:
        y = axes.y(level)
        body.append(
            f'<line class="zero" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke-dasharray="6 3"/>'
        )
        body.append(_text(LEFT + 4, y - 4, level_label, "tick"))
        taken.append((LEFT, y - 16, LEFT + 4 + len(level_label) * CHARACTER, y + 2))
    ends = []
    for curve in curves:
        points = [(axes.x(math.log2(x)), axes.y(y), x, y) for x, y in curve.points if x > 0]
        if not points:
            continue
        for (x0, y0, *_), (x1, y1, *_) in pairwise(points):  # labels keep off the lines as well
            at = [(x0 + (x1 - x0) * k / 6, y0 + (y1 - y0) * k / 6) for k in range(1, 6)]
            taken += [(x - 2, y - 2, x + 2, y + 2) for x, y in at]
        line = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y, _, _ in points)
        body.append(f'<path d="{line}" fill="none" stroke="{colour(curve.series)}" stroke-width="2"/>')
        for (x, y, passes, value), hollow in zip(points, curve.hollow, strict=True):
            tip = escape(f"{curve.label}: {y_text(value)} at {compact(passes)}")
            body.append(f"<g>{_marker(x, y, curve.series, hollow)}<title>{tip}</title></g>")
        ends.append((points[-1][0], points[-1][1], curve.label))
    body += [_label(x, y, label, taken) for x, y, label in sorted(ends, key=lambda end: end[1])]
    return _svg("".join(body), title)


LIGHT = {
    "--card": "#ffffff", "--ink": "#14181f", "--soft": "#5a6472", "--grid": "#e8ebef", "--s0": "#2458d3",
    "--s1": "#c2410c", "--s2": "#0b7a53", "--s3": "#a3247f", "--s4": "#6741d9", "--s5": "#94690a", "--s6": "#0b7285",
    "--control": "#6b7480",
}  # fmt: skip
"""The page's colours by day, for charts that stand alone."""


def standalone(svg: str) -> str:
    """A chart as a file of its own: the page's light colours, a white ground, and its size in pixels."""
    colours = "".join(f"{name}:{value};" for name, value in LIGHT.items())
    style = (
        f"<style>svg{{{colours}font-family:system-ui,sans-serif;background:var(--card)}}.grid{{stroke:var(--grid)}}"
        ".zero,.leader{stroke:var(--soft)}text{fill:var(--soft);font-size:11.5px;"
        "paint-order:stroke;stroke:var(--card);stroke-width:3px;stroke-linejoin:round}"
        ".label{font-size:12px;font-weight:600;fill:var(--ink)}</style>"
    )
    size = f'<svg xmlns="http://www.w3.org/2000/svg" width="{2 * WIDTH}" height="{2 * HEIGHT}" class="chart"'
    return svg.replace('<svg class="chart"', size, 1).replace("</title>", f"</title>{style}", 1) + "\n"


def _thin(points: Sequence[tuple[float, float]], most: int = 240) -> list[tuple[float, float]]:
    step = max(1, math.ceil(len(points) / most))
    return [*points[::step], *([points[-1]] if (len(points) - 1) % step else [])]


def _smooth(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the centred moving average over about a thirtieth of the curve; it does not lag behind a falling loss."""
    half = max(1, len(points) // 60)
    smoothed = []
    for n, (x, _) in enumerate(points):
        reach = min(half, n, len(points) - 1 - n)  # symmetric, so that the ends keep their values
        window = [y for _, y in points[n - reach : n + reach + 1]]
        smoothed.append((x, sum(window) / len(window)))
    return smoothed


def _path(axes: _Axes, points: Sequence[tuple[float, float]]) -> str:
    top = TOP - 4
    return "M" + "L".join(f"{axes.x(x):.1f} {max(axes.y(y), top):.1f}" for x, y in points)


def forest(bars: Sequence[Bar], x_title: str, x_text: Format, title: str) -> str:
    """Draw differences to a baseline with their intervals around the line of no difference."""
    if not bars:
        return ""
    row, top = 40, 8
    height = top + row * len(bars) + BOTTOM
    ends = [0.0, *(b.low for b in bars), *(b.high for b in bars)]
    low, high = min(ends), max(ends)
    pad = (high - low) * 0.06 or 1.0
    low, high = low - pad, high + pad

    def x(value: float) -> float:
        return 14 + (value - low) / (high - low) * (WIDTH - 28)

    body = []
    marks = ticks(low, high, 4)
    for value in marks:
        body.append(_text(x(value), height - BOTTOM + 15, x_text(value) if value else "0", "tick", "middle"))
    for n, bar in enumerate(bars):
        y = top + row * n + 28
        for value in marks:  # beside the interval only, not behind the text
            kind = "zero" if value == 0 else "grid"
            body.append(f'<line class="{kind}" x1="{x(value):.1f}" x2="{x(value):.1f}" y1="{y - 7}" y2="{y + 7}"/>')
        interval = f"{x_text(bar.value)} [{x_text(bar.low)}, {x_text(bar.high)}]"
        body.append(_text(14, y - 11, bar.label, "label"))
        body.append(_text(WIDTH - 14, y - 11, interval, "tick", "end"))
        body.append(
            f'<line x1="{x(bar.low):.1f}" x2="{x(bar.high):.1f}" y1="{y}" y2="{y}" stroke="{colour(bar.series)}" '
            f'stroke-width="3" stroke-linecap="round"/>'
        )
        tip = f"{bar.label}: {interval}"
        body.append(f"<g>{_marker(x(bar.value), y, bar.series, False)}<title>{escape(tip)}</title></g>")
    body.append(_text(WIDTH / 2, height - 8, x_title, "axis", "middle"))
    return _svg("".join(body), title, height)


def mask_picture(rows: Sequence[str], title: str) -> str:
    """Draw an attention mask given as rows of ``■`` (reads) and ``·`` (does not): one path of unit squares."""
    wide = max(len(row) for row in rows)
    path = []
    for y, row in enumerate(rows):
        x = 0
        while x < len(row):
            run = len(row[x:]) - len(row[x:].lstrip("■"))
            if run:
                path.append(f"M{x} {y}h{run}v1h-{run}z")
            x += max(run, 1)
    cells = "".join(f"M0 {y}H{wide}" for y in range(len(rows) + 1)) + "".join(
        f"M{x} 0V{len(rows)}" for x in range(wide + 1)
    )
    return (
        f'<svg class="mask" viewBox="-.1 -.1 {wide + 0.2} {len(rows) + 0.2}" role="img" '
        f'aria-label="{escape(title, quote=True)}" style="max-width:{min(320, 14 * wide)}px">'
        f'<title>{escape(title)}</title><path class="on" d="{"".join(path)}"/><path class="lines" d="{cells}"/></svg>'
    )
