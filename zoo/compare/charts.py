"""The report's charts: a metric against cost with its Pareto front, differences, curves and sweeps. See `plotting`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from zoo.compare.labels import Box
from zoo.compare.plotting import (
    BOTTOM,
    DASHES,
    RIGHT,
    SERIES,
    STAND_IN,
    WIDTH,
    Format,
    compact,
    draw,
    marker,
    new_axes,
    padded,
    pixels,
    round_values,
    set_limits,
    set_log_ticks,
    set_ticks,
    variable,
    write_labels,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_LABELS = 14
"""Points that all carry their names; of more, those of the front do, and the others where the pointer rests."""
FAINT = 8
"""Curves of one chart that are drawn with the unsmoothed ones behind them; more are thin and alone."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """A point of a scatter chart; ``low`` and ``high`` draw a whisker; ``hollow`` marks what is not comparable.

    ``front`` says whether it may lie on the Pareto front.
    """

    x: float
    y: float
    label: str
    series: int
    low: float | None = None
    high: float | None = None
    hollow: bool = False
    front: bool = True


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
class LawLine:
    """Points of a family over compute, with ``front`` telling those its power law was fitted to, and the law between
    the ends of the chart, as two points of a straight line; ``texts`` stand where the pointer rests."""

    points: Sequence[tuple[float, float]]
    front: Sequence[bool]
    texts: Sequence[str]
    law: tuple[tuple[float, float], tuple[float, float]] | None
    label: str
    series: int


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A row of a forest chart: an interval around a value; ``note`` stands behind its numbers, and ``hollow`` marks
    what is exploratory."""

    label: str
    value: float
    low: float
    high: float
    series: int
    note: str = ""
    hollow: bool = False


def pareto(points: Sequence[Point], higher_is_better: bool) -> list[Point]:
    """The points that no other beats: none is as good at less cost, or better at the same; ascending in x."""
    sign = 1 if higher_is_better else -1
    front: list[Point] = []
    for point in sorted((p for p in points if p.front), key=lambda p: (p.x, -sign * p.y)):
        if not front or sign * point.y > sign * front[-1].y:
            front.append(point)
    return front


def scatter(
    points: Sequence[Point],
    x_title: str,
    y_title: str,
    y_text: Format,
    title: str,
    higher_is_better: bool | None = None,
) -> str:
    """Draw labelled points and, where a direction is given, the Pareto front: the best at each cost or less.

    Empty where there are fewer than two points, or all have the same x: these say nothing about a trade-off. The x axis
    is logarithmic where the values span a factor of ten and more.
    """
    if len({p.x for p in points}) < 2:
        return ""
    log = min(p.x for p in points) > 0 and max(p.x for p in points) >= 10 * min(p.x for p in points)
    front = [] if higher_is_better is None else pareto(points, higher_is_better)
    named = points if len(points) <= MOST_LABELS else (front or points)[:MOST_LABELS]

    def paint(figure: Figure) -> dict[str, str]:
        axes = new_axes(figure, x_title, y_title)
        whiskers = [v for p in points for v in (p.low, p.high) if v is not None]
        set_limits(axes, [p.x for p in points], [*(p.y for p in points), *whiskers], log, y_text)
        low, high = axes.get_ylim()
        if front:  # it goes on to the right: what costs more may be as good
            xs, ys = [*(p.x for p in front), axes.get_xlim()[1]], [*(p.y for p in front), front[-1].y]
            axes.step(xs, ys, where="post", color=STAND_IN["--soft"], lw=1.2, ls=DASHES[1], zorder=1)
        tips = {}
        for n, p in enumerate(points):
            if p.low is not None and p.high is not None:
                axes.plot([p.x, p.x], [max(p.low, low), min(p.high, high)], color=STAND_IN[variable(p.series)], lw=1)
            marker(axes, p.x, p.y, p.series, p.hollow, f"tip{n}")
            tips[f"tip{n}"] = f"{p.label}: {y_text(p.y)} at {compact(p.x)}" + (" (on the front)" if p in front else "")
        spots = {id(p): pixels(axes, p.x, p.y) for p in points}
        taken: list[Box] = [(x - 6, y - 6, x + 6, y + 6) for x, y in spots.values()]
        steps = [*(spots[id(p)] for p in front), (WIDTH - RIGHT, spots[id(front[-1])][1])] if front else []
        for (x0, y0), (x1, y1) in pairwise(steps):  # names keep off the front
            taken += [(x0, y0 - 1, x1, y0 + 1), (x1 - 1, min(y0, y1), x1 + 1, max(y0, y1))]
        order = sorted(named, key=lambda p: (p not in front, p.hollow, -p.y))  # where room is short, the front has it
        write_labels(axes, [(*spots[id(p)], p.label) for p in order], taken)
        return tips

    return draw(title, paint)


def lines(curves: Sequence[Line], x_title: str, y_title: str, title: str) -> str:
    """Draw curves over samples or steps: the smoothed curve, and the raw one faintly behind it where there are few."""
    curves = [curve for curve in curves if len(curve.points) > 1]
    if not curves:
        return ""
    ordered = sorted(y for curve in curves for _, y in curve.points)
    ceiling = ordered[int(0.995 * (len(ordered) - 1))]  # one exploding step must not flatten the rest
    most = 240 if len(curves) <= FAINT else 90

    def paint(figure: Figure) -> dict[str, str]:
        axes = new_axes(figure, x_title, y_title)
        ys = [min(y, ceiling) for y in ordered]
        axes.set_xlim(*padded([x for c in curves for x, _ in c.points], 0.0))
        axes.set_ylim(*padded(ys, 0.06))
        set_ticks(axes.xaxis, *axes.get_xlim(), 4, compact)
        set_ticks(axes.yaxis, *axes.get_ylim(), 6, compact)
        top, tips = axes.get_ylim()[1], {}
        for n, curve in enumerate(curves):
            ink = STAND_IN[variable(curve.series)]
            smooth = [(x, min(y, top)) for x, y in _thin(_smooth(curve.points), most)]
            if len(curves) <= FAINT:
                raw = [(x, min(y, top)) for x, y in _thin(curve.points, most)]
                axes.plot(*zip(*raw, strict=True), color=ink, lw=1, alpha=0.28)
            dash = DASHES[max(curve.series, 0) // SERIES % len(DASHES)]
            axes.plot(
                *zip(*smooth, strict=True), color=ink, lw=2 if len(curves) <= FAINT else 1.2, ls=dash, gid=f"tip{n}"
            )
            tips[f"tip{n}"] = curve.label
        return tips

    return draw(title, paint)


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
    curves = [c for c in curves if any(x > 0 for x, _ in c.points)]
    flat = [point for curve in curves for point in curve.points if point[0] > 0]
    if not flat:
        return ""

    def paint(figure: Figure) -> dict[str, str]:
        axes = new_axes(figure, x_title, y_title)
        low, high = padded([math.log2(x) for x, _ in flat], 0.08)
        axes.set_xscale("log", base=2)
        axes.set_xlim(2**low, 2**high)
        axes.minorticks_off()
        first, last = math.ceil(low), math.floor(high)
        places = [2.0**n for n in range(first, last + 1, max(1, (last - first + 1) // 6))]
        axes.xaxis.set_ticks(places, [compact(v) for v in places])
        axes.set_ylim(*padded([*(y for _, y in flat), *([] if level is None else [level])], 0.12))
        set_ticks(axes.yaxis, *axes.get_ylim(), 6, y_text)
        taken: list[Box] = [(x - 6, y - 6, x + 6, y + 6) for x, y in (pixels(axes, *point) for point in flat)]
        if level is not None:
            axes.plot(axes.get_xlim(), [level, level], color=STAND_IN["--soft"], lw=1, ls=DASHES[1])
            x, y = pixels(axes, axes.get_xlim()[0], level)
            axes.annotate(
                level_label, (0, level), (4, 4), xycoords=("axes fraction", "data"), textcoords="offset points",
                color=STAND_IN["--soft"],
            )  # fmt: skip
            taken.append((x, y - 16, x + 8 + 6.7 * len(level_label), y + 2))
        tips, ends = {}, []
        for n, curve in enumerate(curves):
            points = [point for point in curve.points if point[0] > 0]
            axes.plot(*zip(*points, strict=True), color=STAND_IN[variable(curve.series)], lw=2)
            spots = [pixels(axes, *point) for point in points]
            for (x0, y0), (x1, y1) in pairwise(spots):  # labels keep off the lines as well
                at = [(x0 + (x1 - x0) * k / 6, y0 + (y1 - y0) * k / 6) for k in range(1, 6)]
                taken += [(x - 2, y - 2, x + 2, y + 2) for x, y in at]
            for m, ((x, y), hollow) in enumerate(zip(curve.points, curve.hollow, strict=True)):
                if x > 0:
                    marker(axes, x, y, curve.series, hollow, f"tip{n}-{m}")
                    tips[f"tip{n}-{m}"] = f"{curve.label}: {y_text(y)} at {compact(x)}"
            ends.append((*spots[-1], curve.label))
        write_labels(axes, sorted(ends, key=lambda end: end[1]), taken)
        return tips

    return draw(title, paint)


def laws(curves: Sequence[LawLine], x_title: str, y_title: str, y_text: Format, title: str) -> str:
    """Draw families over compute, both axes logarithmic: filled points lie on their front, lines are power laws."""
    flat = [point for curve in curves for point in curve.points]
    if not flat or any(x <= 0 or y <= 0 for x, y in flat):
        return ""

    def paint(figure: Figure) -> dict[str, str]:
        axes = new_axes(figure, x_title, y_title)
        set_limits(axes, [x for x, _ in flat], [y for _, y in flat], True, y_text)
        low, high = (math.log10(v) for v in (min(y for _, y in flat), max(y for _, y in flat)))
        pad = 0.12 * (high - low) or 0.05
        axes.set_yscale("log")
        axes.set_ylim(10 ** (low - pad), 10 ** (high + pad))
        axes.minorticks_off()
        set_log_ticks(axes.yaxis, *axes.get_ylim(), y_text)
        if len(axes.get_yticks()) < 3:  # less than a decade has few round powers
            set_ticks(axes.yaxis, *axes.get_ylim(), 5, y_text)
        taken: list[Box] = [(x - 6, y - 6, x + 6, y + 6) for x, y in (pixels(axes, *point) for point in flat)]
        tips, ends = {}, []
        for n, curve in enumerate(curves):
            if curve.law is not None:
                axes.plot(*zip(*curve.law, strict=True), color=STAND_IN[variable(curve.series)], lw=1.6, ls=DASHES[1])
            for m, ((x, y), kept) in enumerate(zip(curve.points, curve.front, strict=True)):
                marker(axes, x, y, curve.series, not kept, f"tip{n}-{m}")
                tips[f"tip{n}-{m}"] = f"{curve.label}, {curve.texts[m]}: {y_text(y)} at {compact(x)}"
            last = max((p for p, kept in zip(curve.points, curve.front, strict=True) if kept), default=curve.points[-1])
            ends.append((*pixels(axes, *last), curve.label))
        write_labels(axes, sorted(ends, key=lambda end: end[1]), taken)
        return tips

    return draw(title, paint)


def forest(bars: Sequence[Bar], x_title: str, x_text: Format, title: str) -> str:
    """Draw differences to a baseline with their intervals around the line of no difference."""
    if not bars:
        return ""
    intervals = [f"{x_text(b.value)} [{x_text(b.low)}, {x_text(b.high)}]{b.note}" for b in bars]
    beside = all(7.2 * len(b.label) + 6.6 * len(i) < WIDTH - 40 for b, i in zip(bars, intervals, strict=True))
    row, top = (40 if beside else 56), 8  # a long name has a line of its own
    height = top + row * len(bars) + BOTTOM

    def paint(figure: Figure) -> dict[str, str]:
        axes = figure.add_axes((14 / WIDTH, BOTTOM / height, (WIDTH - 28) / WIDTH, row * len(bars) / height))
        axes.set_axis_off()
        ends = [0.0, *(b.low for b in bars), *(b.high for b in bars)]
        pad = (max(ends) - min(ends)) * 0.06 or 1.0
        axes.set_xlim(min(ends) - pad, max(ends) + pad)
        axes.set_ylim(row * len(bars), 0)  # units from the top
        marks = round_values(*axes.get_xlim(), 4)
        for mark in marks:
            axes.text(mark, row * len(bars) + 15, x_text(mark) if mark else "0", ha="center", color=STAND_IN["--soft"])
        middles = [row * n + row - 12 for n in range(len(bars))]
        for mark in marks:  # beside the interval only, not behind the text
            ink = STAND_IN["--soft" if mark == 0 else "--grid"]
            axes.vlines([mark] * len(bars), [y - 7 for y in middles], [y + 7 for y in middles], color=ink, lw=1)
        tips = {}
        for n, (bar, interval, y) in enumerate(zip(bars, intervals, middles, strict=True)):
            label = bar.label if len(bar.label) < 54 else bar.label[:53] + "…"
            axes.text(
                0, y - (11 if beside else 27), label, transform=axes.get_yaxis_transform(), color=STAND_IN["--ink"],
                fontsize=12, fontweight="bold",
            )  # fmt: skip
            axes.text(1, y - 11, interval, ha="right", transform=axes.get_yaxis_transform(), color=STAND_IN["--soft"])
            axes.plot([bar.low, bar.high], [y, y], color=STAND_IN[variable(bar.series)], lw=3, solid_capstyle="round")
            marker(axes, bar.value, y, bar.series, bar.hollow, f"tip{n}")
            tips[f"tip{n}"] = f"{bar.label}: {interval}"
        figure.text(0.5, 8 / height, x_title, ha="center", color=STAND_IN["--soft"])
        return tips

    return draw(title, paint, height)


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
