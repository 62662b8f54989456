"""Quality against sampling steps: what ``zoo eval --sweep`` left in run directories, as curves, a table and charts."""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zoo.compare import charts
from zoo.compare.leaderboard import Column, Row
from zoo.compare.tables import heading
from zoo.compare.text_tables import markdown, md
from zoo.evaluation.catalogue import METRICS, metric_info
from zoo.evaluation.sweep import SWEEP_FILE

PASSES = "passes"
"""The metric that says how many forward passes an image took."""

STEPS = "steps"
"""The field whose values are drawn as the forward passes that they took."""


@dataclass(frozen=True)
class SweepPoint:
    """A row at one value of a field: means over the seeds that were evaluated there.

    Attributes:
        value: As in the folder's name, ``8`` or ``all``.
        x: Of steps the forward passes an image where they were counted, else the value.
        flagged: Measured under other conditions than most points of its task.
    """

    row: str
    task: str
    field: str
    value: str
    x: float
    metrics: Mapping[str, float]
    seeds: int
    flagged: bool = False


@dataclass(frozen=True)
class Swept:
    """All points of one task and field, row by row, ascending."""

    task: str
    field: str
    points: tuple[SweepPoint, ...]

    @property
    def columns(self) -> tuple[Column, ...]:
        """The metrics of the overview that any point has."""
        present = {metric for point in self.points for metric in point.metrics}
        names = [m for m in METRICS.get(self.task, {}) if m in present] or sorted(present - {PASSES})
        found = [(name, metric_info(self.task, name)) for name in names]
        return tuple(Column(self.task, name, info) for name, info in found if info is not None and not info.detail)

    @property
    def title(self) -> str:
        """What the x axis shows."""
        counted = self.field == STEPS and all(PASSES in point.metrics for point in self.points)
        return "forward passes an image" if counted else self.field


def find_sweeps(rows: Sequence[Row]) -> tuple[Swept, ...]:
    """Read ``eval/FIELD=VALUE`` of every run; folders that cannot be read are passed over."""
    cells: dict[tuple[str, str, str, str], list[tuple[Mapping[str, float], str]]] = {}
    for row in rows:
        for run in row.runs:
            for file in sorted(run.path.glob(f"eval/*/{SWEEP_FILE}")):
                for task, metrics, condition, field in _read(file):
                    cells.setdefault((task, field, row.name, _value(file.parent)), []).append((metrics, condition))
    usual = {
        task: Counter(c for (t, *_), found in cells.items() if t == task for _, c in found).most_common(1)[0][0]
        for task, *_ in cells
    }
    points: dict[tuple[str, str], list[SweepPoint]] = {}
    for (task, field, name, value), found in cells.items():
        shared = set.intersection(*(set(metrics) for metrics, _ in found))
        mean = {
            metric: statistics.fmean(metrics[metric] for metrics, _ in found)
            for metric in found[0][0]
            if metric in shared
        }
        x = mean[PASSES] if field == STEPS and PASSES in mean else _number(value)
        if x is not None:
            flagged = any(condition != usual[task] for _, condition in found)
            points.setdefault((task, field), []).append(
                SweepPoint(name, task, field, value, x, mean, len(found), flagged)
            )
    order = [row.name for row in rows]
    return tuple(
        Swept(task, field, tuple(sorted(found, key=lambda p: (order.index(p.row), p.x))))
        for (task, field), found in points.items()
    )


def _read(file: Path) -> list[tuple[str, Mapping[str, float], str, str]]:
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
        found = json.loads((file.parent / "metrics.json").read_text(encoding="utf-8"))
        return [
            (
                task,
                {k: float(v) for k, v in found[task].items() if math.isfinite(v)},
                str(condition),
                str(said["field"]),
            )
            for task, condition in said["conditions"].items()
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []


def _value(folder: Path) -> str:
    return folder.name.partition("=")[2]


def _number(value: str) -> float | None:
    try:
        return float(value)
    except ValueError:
        return None


def sweep_charts(swept: Swept, series: Mapping[str, int], labels: Mapping[str, str]) -> list[tuple[Column, str]]:
    """A chart for the task's headline and for each distance between sets, a line a row; a dashed line where real images
    lie."""
    drawn = []
    for column in swept.columns:
        if not (column.info.primary or not column.info.numerator):
            continue
        points = [p for p in swept.points if column.metric in p.metrics]
        curves = [
            charts.Trend(
                points=[(p.x, p.metrics[column.metric]) for p in points if p.row == name],
                hollow=[p.flagged for p in points if p.row == name],
                label=labels.get(name, name),
                series=series.get(name, 0),
            )
            for name in dict.fromkeys(p.row for p in points)
        ]
        real = [v for p in points if not p.flagged and (v := p.metrics.get(f"{column.metric}_real")) is not None]
        level = statistics.fmean(real) if real else None
        title = f"{heading(column)} against {swept.title}"
        picture = charts.trends(curves, swept.title, heading(column), column.text, title, level, "real images")
        if picture:
            drawn.append((column, picture))
    return drawn


def sweep_rows(swept: Swept) -> list[list[str]]:
    """The table's lines: row, value, passes, seeds, then a number a column."""
    out = []
    for point in swept.points:
        passes = point.metrics.get(PASSES)
        numbers = [
            column.text(point.metrics[column.metric]) if column.metric in point.metrics else "–"
            for column in swept.columns
        ]
        name = point.row + (" ⚠" if point.flagged else "")
        out.append([name, point.value, "–" if passes is None else f"{passes:.4g}", str(point.seeds), *numbers])
    return out


def sweep_heads(swept: Swept) -> list[str]:
    """The table's headings."""
    return ["run", swept.field, "passes an image", "seeds", *(heading(column) for column in swept.columns)]


def sweeps_markdown(sweeps: Sequence[Swept]) -> str:
    """A table a task, real images as its last line."""
    parts = []
    for swept in sweeps:
        real = real_row(swept)
        lines = [[md(cell) for cell in line] for line in (*sweep_rows(swept), *([real] if real else []))]
        note = (
            "\n- ⚠ other conditions: data, split, evaluator or fields\n" if any(p.flagged for p in swept.points) else ""
        )
        parts.append(f"\n## {swept.task} against {swept.field}\n\n{markdown(sweep_heads(swept), lines)}{note}")
    return "".join(parts)


def real_row(swept: Swept) -> list[str]:
    """What real images get, of the points under the usual conditions; nothing where it was not measured."""
    found: list[Any] = []
    for column in swept.columns:
        values = [
            v for p in swept.points if not p.flagged and (v := p.metrics.get(f"{column.metric}_real")) is not None
        ]
        found.append(column.text(statistics.fmean(values)) if values else "–")
    return ["real images", "–", "–", "–", *found] if any(text != "–" for text in found) else []
