"""Which plots the page shows of a leaderboard: trade-offs, differences, training. `charts` draws them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from zoo.compare import charts
from zoo.compare.characteristics import Characteristics
from zoo.compare.leaderboard import Cell, Column, Leaderboard, Row
from zoo.compare.plotting import CONTROL
from zoo.compare.sweeps import PASSES
from zoo.compare.tables import heading, mark

MOST_BARS = 40
"""Rows of one forest plot; the largest differences are shown, and all are in the table and the CSV file."""
MOST_CURVES = 40
"""Curves of one chart of training."""
MOST_CHARTS = 12
"""Charts of training: the loss and as many objectives and reports."""
CURVE_KEYS = {"step", "samples", "tokens", "seconds", "stage", "lr", "loss", "epoch"}

Labels = Mapping[str, str]
Colours = Mapping[str, int]


def colours(rows: Sequence[Row]) -> dict[str, int]:
    """Give every row its colour: controls are grey, the others count up."""
    plain = [row.name for row in rows if not row.control]
    numbers = {name: n for n, name in enumerate(plain)}
    return {row.name: CONTROL if row.control else numbers[row.name] for row in rows}


def trade_offs(
    column: Column, board: Leaderboard, facts: Mapping[str, Characteristics], series: Colours, labels: Labels
) -> list[str]:
    """Draw a metric against training FLOPs, parameters, visual tokens and sampling steps, where they differ."""

    def tokens(row: Row) -> float | None:
        found = facts[row.name].visual_tokens if row.name in facts else None
        return None if found is None else float(found)

    def passes(row: Row) -> float | None:
        counted = [v for run in row.runs if (v := run.metrics.get(column.task, {}).get(PASSES)) is not None]
        return sum(counted) / len(counted) if counted else None

    axes: tuple[tuple[str, Callable[[Row], float | None]], ...] = (
        ("training FLOPs", lambda row: row.mean("cost", "flops", "total")),
        ("parameters", lambda row: row.mean("parameters", "total")),
        ("visual tokens an image", tokens),
        ("sampling steps (forward passes an image)", passes),
    )
    rows = [row for row in board.rows if column.key in row.cells]
    y_title = heading(column)
    drawn = []
    for x_title, place in axes:
        points = [
            _point(row, x, row.cells[column.key], series, labels) for row in rows if (x := place(row)) is not None
        ]
        points = _in_scale(points)
        direction = column.info.higher_is_better
        drawn.append(charts.scatter(points, x_title, y_title, column.text, f"{y_title} against {x_title}", direction))
    return [picture for picture in drawn if picture]


def _in_scale(points: Sequence[charts.Point]) -> list[charts.Point]:
    """Leave out what is not comparable and would dwarf what is: further away than the whole range of that."""
    fair = [v for p in points if not p.hollow for v in (p.y, p.low, p.high) if v is not None]
    if sum(not p.hollow for p in points) < 2:
        return list(points)
    span = (max(fair) - min(fair)) or abs(max(fair)) or 1.0
    return [p for p in points if not p.hollow or min(fair) - span <= p.y <= max(fair) + span]


def _point(row: Row, x: float, cell: Cell, series: Colours, labels: Labels) -> charts.Point:
    low, high = (cell.mean - cell.spread, cell.mean + cell.spread) if cell.spread is not None else (None, None)
    return charts.Point(
        x=x,
        y=cell.mean,
        label=labels[row.name],
        series=series[row.name],
        low=low,
        high=high,
        hollow=bool(row.flags),
        front=row.comparable and not row.control,
    )


def differences(column: Column, board: Leaderboard, series: Colours, labels: Labels) -> tuple[str, int]:
    """Draw the differences to the baseline; also how many there are beyond those that are drawn."""
    found = [
        (row, cell.difference)
        for row in board.rows
        if (cell := row.cells.get(column.key)) is not None and cell.difference is not None
    ]
    largest = sorted(found, key=lambda pair: -abs(pair[1].mean))[:MOST_BARS]
    kept = {row.name for row, _ in largest}
    bars = [
        charts.Bar(
            label=labels[row.name],
            value=d.mean,
            low=d.low,
            high=d.high,
            series=series[row.name],
            note=f" {mark(d)}" if mark(d) else "",
            hollow=d.exploratory,
        )
        for row, d in found
        if row.name in kept
    ]
    against = labels.get(board.baselines.get(column.key, ""), "the baseline")
    over = "items" if all(d.exploratory for _, d in found) else "seeds and items"
    text = partial(column.text, signed=True)
    against = against if len(against) < 44 else against[:43] + "…"
    title = f"{heading(column)}: differences, 95 % intervals over {over}"
    return charts.forest(bars, f"difference to {against}", text, title), len(found) - len(bars)


def training(board: Leaderboard, series: Colours, labels: Labels) -> tuple[list[tuple[str, str, int]], list[str]]:
    """Draw one chart an objective: its name, the chart, and how many curves there are beyond those drawn; also the
    names of those that are not drawn. Runs without a named objective show their loss."""
    found: dict[str, list[charts.Line]] = {}
    rows = sorted(board.rows, key=lambda row: (not row.comparable, row.control))  # what may be compared is drawn first
    for row in rows:
        for run in row.runs:
            names = {k for line in run.curve for k, v in line.items() if k not in CURVE_KEYS and is_number(v)}
            for name in sorted(names) or ["loss"]:
                points = [
                    (float(line.get("samples", line.get("step", 0))), float(line[name]))
                    for line in run.curve
                    if is_number(line.get(name)) and is_number(line.get("samples", line.get("step")))
                ]
                label = labels[row.name] + (f", seed {run.seed}" if len(row.runs) > 1 else "")
                found.setdefault(name, []).append(charts.Line(points=points, label=label, series=series[row.name]))
    ordered = sorted(found.items(), key=lambda item: ("/" in item[0], -len(item[1])))
    left = [name for name, _ in ordered[MOST_CHARTS:]]
    drawn = [
        (name, charts.lines(curves[:MOST_CURVES], "samples seen", name, f"{name} while training"), len(curves))
        for name, curves in ordered[:MOST_CHARTS]
    ]
    return [(name, picture, max(0, count - MOST_CURVES)) for name, picture, count in drawn if picture], left


def is_number(value: Any) -> bool:
    """Whether it is a number that can be drawn."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300
