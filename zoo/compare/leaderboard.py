"""The comparison: runs become rows (grouped over seeds), metrics columns, and whatever is not comparable is flagged."""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from zoo.compare.item_scores import ItemScores, ScoreFiles
from zoo.compare.rundir import HASHES, Run
from zoo.compare.statistics import Difference, differences, paired_estimates
from zoo.errors import RunError, near
from zoo.evaluation.catalogue import METRICS, MetricInfo, metric_info

EXECUTION = (
    "accelerator", "devices", "nodes", "compile", "workers", "log_every", "checkpoint_every", "deterministic",
    "keep", "timeout", "restarts",
)  # fmt: skip
"""Trainer fields that say how a run is executed, not what it learns."""


@dataclass(frozen=True)
class Column:
    """One metric of one task."""

    task: str
    metric: str
    info: MetricInfo

    @property
    def key(self) -> tuple[str, str]:
        return self.task, self.metric

    def text(self, value: float, signed: bool = False) -> str:
        """Format a value: shares as percent with one decimal, ranks with one, anything else with three."""
        digits = 1 if self.info.percent or self.metric.endswith("median_rank") else 3
        number = f"{100 * value if self.info.percent else value:{'+' if signed else ''}.{digits}f}"
        return number.replace("-", "\u2212")


@dataclass(frozen=True)
class Cell:
    """A metric of a row.

    Attributes:
        mean: over seeds.
        spread: sample standard deviation over seeds, ``None`` with one.
        best: best of the rows that may be compared.
        difference: to the baseline; ``None`` for the baseline itself, for rows that must not be compared with it, and
            where there are no per-item scores.
    """

    mean: float
    spread: float | None = None
    best: bool = False
    difference: Difference | None = None


@dataclass(frozen=True)
class Row:
    """Runs that differ in nothing but their seed.

    Attributes:
        name: as shown; unique in the table.
        flags: what keeps it from being compared with the reference row, one line each.
    """

    name: str
    runs: tuple[Run, ...]
    flags: tuple[str, ...] = ()
    cells: Mapping[tuple[str, str], Cell] = field(default_factory=dict)

    @property
    def control(self) -> bool:
        return self.runs[0].control

    @property
    def exploratory(self) -> bool:
        """One seed shows no more than a direction."""
        return len(self.runs) == 1

    @property
    def comparable(self) -> bool:
        return not self.flags

    def has(self, task: str) -> bool:
        """Whether the row was measured on ``task``."""
        return any(key[0] == task for key in self.cells)

    @property
    def seeds(self) -> tuple[str, ...]:
        return tuple(run.seed for run in self.runs)

    def mean(self, *keys: str) -> float | None:
        """Return the mean over seeds of a number of the manifest."""
        values = [v for run in self.runs if (v := run.number(*keys)) is not None]
        return sum(values) / len(values) if values else None


@dataclass(frozen=True)
class Leaderboard:
    """The table.

    Attributes:
        rows: controls last; the reference, whose hashes the others are held against, is ``reference``.
        baselines: metric -> name of the row that differences are taken against.
        unfinished: runs that are not in the table, with the reason.
        warnings: what a reader must know, one line each.
    """

    rows: tuple[Row, ...]
    columns: tuple[Column, ...]
    reference: str
    baselines: Mapping[tuple[str, str], str]
    unfinished: tuple[tuple[Run, str], ...]
    warnings: tuple[str, ...]

    @cached_property
    def tasks(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(c.task for c in self.columns))

    @property
    def overview(self) -> tuple[Column, ...]:
        """The columns of the overview; all columns when none is meant for it."""
        return tuple(c for c in self.columns if not c.info.detail) or self.columns

    @property
    def primary(self) -> tuple[Column, ...]:
        """One column a task: the one that plots show."""
        chosen = {}
        for column in self.columns:
            if column.info.primary or column.task not in chosen:
                chosen[column.task] = column
        return tuple(chosen.values())


def build_leaderboard(runs: Sequence[Run], baseline: str | None = None) -> Leaderboard:
    """Group finished runs over seeds, flag what is not comparable, and take differences to the baseline.

    Args:
        baseline: name of the row to compare with. Without one, hashes are held against the first of the rows whose
            conditions most rows share, and each metric's differences are taken to the first control that has it, else
            to
            the first row that has it.

    Raises:
        RunError: there is no such baseline.
    """
    finished = [run for run in runs if run.metrics and run.status == "done"]
    unfinished = tuple((run, _why_not(run)) for run in runs if not (run.metrics and run.status == "done"))
    rows, warnings = _group(finished)
    for run in finished:
        warnings += [f"{run.name} (seed {run.seed}): {problem}" for problem in run.problems]
    rows.sort(key=lambda row: row.control)  # stable: controls last, else as found
    columns = _columns(rows)
    if not rows:
        if baseline is not None:
            raise RunError(f"the baseline {baseline!r} is no finished run: no run is finished yet")
        return Leaderboard((), (), "", {}, unfinished, tuple(warnings))

    conditions = Counter(_conditions(row) for row in rows)
    reference = max(rows, key=lambda row: conditions[_conditions(row)])  # the first of equals
    if baseline is not None:
        named = [row for row in rows if row.name == baseline]
        if not named:
            raise RunError(f"the baseline {baseline!r} is no finished run{near(baseline, [row.name for row in rows])}")
        reference = named[0]
    rows = [replace(row, flags=_flags(row, reference)) for row in rows]
    warnings += _warnings(rows)

    table: list[dict[tuple[str, str], Cell]] = [{} for _ in rows]
    baselines: dict[tuple[str, str], str] = {}
    reasons: dict[tuple[str, str], tuple[str, ...]] = {}
    files = ScoreFiles()
    for column in columns:
        having = [row for row in rows if any(column.key[1] in run.metrics.get(column.task, {}) for run in row.runs)]
        against = _baseline(having, reference.name if baseline is not None else None)
        found: dict[str, Difference] = {}
        if against is not None:
            baselines[column.key] = against.name
            fit = []
            for row in having:
                if row is against or not row.comparable:
                    continue
                if (pair := (row.name, against.name)) not in reasons:
                    reasons[pair] = comparable(row, against)
                if not reasons[pair]:
                    fit.append(row)
                    continue
                why = "; ".join(reasons[pair])
                warnings.append(f"{row.name} is not compared with {against.name} on {column.task}: {why}")
            found = column_differences(column, against, fit, files)
        for cells, row in zip(table, rows, strict=True):
            values = [v for run in row.runs if (v := run.metrics.get(column.task, {}).get(column.metric)) is not None]
            if not values:
                continue
            spread = statistics.stdev(values) if len(values) > 1 else None
            cells[column.key] = Cell(sum(values) / len(values), spread, difference=found.get(row.name))
        _mark_best(column, table, rows)
    filled = tuple(replace(row, cells=cells) for row, cells in zip(rows, table, strict=True))
    return Leaderboard(filled, columns, reference.name, baselines, unfinished, tuple(dict.fromkeys(warnings)))


def _why_not(run: Run) -> str:
    """Say why a run is not in the table."""
    error = run.manifest.get("error")
    reason = f": {error}" if error else ""
    if run.status == "done":
        return "; ".join(run.problems) or "it has no metrics"
    return f"{run.status}{reason}" + ("; " + "; ".join(run.problems) if run.problems else "")


def identity(run: Run) -> str:
    """Return a digest of everything that decides a run's result except its seed: runs that share it are one row."""
    config: dict[str, Any] = {k: v for k, v in run.config.items() if k not in ("seed", "format", "tracking")}
    if isinstance(config.get("recipe"), Mapping):
        config["recipe"] = {k: v for k, v in config["recipe"].items() if k != "changed"}
    if isinstance(config.get("trainer"), Mapping):
        config["trainer"] = {k: v for k, v in config["trainer"].items() if k not in EXECUTION}
    hashes = {k: v for k, v in run.hashes.items() if k != "order"}  # the order follows from the seed
    value = [run.name, run.control, config, hashes]
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:6]


def _group(runs: Sequence[Run]) -> tuple[list[Row], list[str]]:
    """Make rows of runs; a repeated seed keeps the run that ended last."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(identity(run), []).append(run)
    names = [members[0].name for members in groups.values()]
    rows, warnings = [], []
    for key, members in groups.items():
        by_seed: dict[str, Run] = {}
        for run in sorted(members, key=lambda r: (r.path / "metrics.json").stat().st_mtime):
            if run.seed in by_seed:
                warnings.append(
                    f"{run.name}: seed {run.seed} was run more than once; the latest is shown ({run.path.name})"
                )
            by_seed[run.seed] = run
        name = members[0].name
        if names.count(name) > 1:
            name = f"{name} #{key}"
        rows.append(Row(name, tuple(by_seed[seed] for seed in sorted(by_seed, key=_numeric))))
    if len(set(names)) < len(names):
        warnings.append("rows marked # share a name but not their configuration: compare their run.yaml")
    return rows, warnings


def _numeric(seed: str) -> tuple[float, str]:
    return (float(seed) if seed.isdigit() else math.inf, seed)


def _columns(rows: Sequence[Row]) -> tuple[Column, ...]:
    """Return the metrics that any row has: the zoo's tasks in the order of the catalogue, then others by name."""
    present: dict[str, set[str]] = {}
    for row in rows:
        for run in row.runs:
            for task, values in run.metrics.items():
                present.setdefault(task, set()).update(values)
    known = [task for task in METRICS if task in present]
    columns = []
    for task in [*known, *sorted(set(present) - set(known))]:
        listed = METRICS.get(task, {})
        order = [m for m in listed if m in present[task]] + sorted(present[task] - set(listed))
        found = [(metric, metric_info(task, metric)) for metric in order]
        columns += [Column(task, metric, info) for metric, info in found if info is not None]
    return tuple(columns)


def _conditions(row: Row) -> tuple[str | None, ...]:
    hashes = row.runs[0].hashes
    return tuple(hashes.get(kind) for kind in HASHES if kind != "order")


def comparable(a: Row, b: Row) -> tuple[str, ...]:
    """Say why row ``a`` must not be compared with row ``b``: one line a reason, none when it may be.

    Rows may be compared that share data, evaluation and budget, and saw the same samples in the same order at some
    seed. What a manifest does not record is not known to be shared.
    """
    reasons = []
    for kind in HASHES:
        if kind == "order":
            continue
        ours, theirs = ({run.hashes.get(kind, "") for run in row.runs} for row in (a, b))
        if "" in ours or "" in theirs:
            reasons.append(f"no {kind} hash recorded" + ("" if "" in ours else f" in {b.name}"))
        elif ours != theirs or len(ours) > 1:
            shown, expected = (", ".join(sorted(h[:8] for h in hashes)) for hashes in (ours, theirs))
            reasons.append(f"other {kind} ({shown}, not {expected})")
    orders = {run.seed: run.hashes.get("order") for run in b.runs}
    shared = [run for run in a.runs if run.seed in orders]
    if not shared:
        reasons.append(f"other seeds ({', '.join(a.seeds)}, not {', '.join(b.seeds)})")
    if None in (run.hashes.get("order") for run in a.runs):
        reasons.append("no order hash recorded")
    elif None in orders.values():
        reasons.append(f"no order hash recorded in {b.name}")
    elif any(run.hashes["order"] != orders[run.seed] for run in shared):
        reasons.append("other sample order at the same seed")
    return tuple(reasons)


def _flags(row: Row, reference: Row) -> tuple[str, ...]:
    """Say what differs between the conditions of a row and the reference; of the reference, what it does not record."""
    if row is reference:
        return tuple(f"no {kind} hash recorded" for kind in HASHES if not row.runs[0].hashes.get(kind))
    return comparable(row, reference)


def _warnings(rows: Sequence[Row]) -> list[str]:
    """Collect what does not forbid a comparison but must be known."""
    warnings = []
    runs = [run for row in rows for run in row.runs]
    for what, values in {
        "hardware: speed, time and memory are not comparable": {_plain(r.manifest.get("hardware")) for r in runs},
        "package versions": {_plain(r.manifest.get("versions")) for r in runs},
        "commits": {_plain((r.manifest.get("git") or {}).get("commit")) for r in runs},
    }.items():
        if len(values) > 1:
            warnings.append(f"the runs were made on {len(values)} different {what}")
    if any((r.manifest.get("git") or {}).get("dirty") for r in runs):
        warnings.append("some runs were made from a checkout with uncommitted changes")
    if len({row.seeds for row in rows}) > 1:
        warnings.append("the rows were not trained with the same seeds: " + _seed_list(rows))
    if any(row.exploratory for row in rows):
        lone = sum(row.exploratory for row in rows)
        rest = "every row has" if lone == len(rows) else f"{lone} of {len(rows)} rows have"
        warnings.append(f"exploratory: {rest} one training seed, so nothing here tells seed noise from a difference")
    return warnings


def _seed_list(rows: Sequence[Row]) -> str:
    return "; ".join(f"{row.name}: {', '.join(row.seeds)}" for row in rows)


def _plain(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _baseline(having: Sequence[Row], named: str | None) -> Row | None:
    """Choose the row that a metric's differences are taken against."""
    if named is not None:
        return next((row for row in having if row.name == named), None)
    fit = [row for row in having if row.comparable] or list(having)
    return next((row for row in fit if row.control), fit[0] if fit else None)


def _mark_best(column: Column, table: list[dict[tuple[str, str], Cell]], rows: Sequence[Row]) -> None:
    """Mark the best value among comparable rows that are no control; a lone value is not best of anything."""
    if column.info.higher_is_better is None:
        return
    sign = 1 if column.info.higher_is_better else -1
    candidates = [
        cells
        for cells, row in zip(table, rows, strict=True)
        if column.key in cells and row.comparable and not row.control
    ]
    if len(candidates) < 2:
        return
    top = max(sign * cells[column.key].mean for cells in candidates)
    for cells in candidates:
        if sign * cells[column.key].mean == top:
            cells[column.key] = replace(cells[column.key], best=True)


def column_differences(
    column: Column, baseline: Row, rows: Sequence[Row], files: ScoreFiles | None = None
) -> dict[str, Difference]:
    """Take differences of rows to a baseline in one metric, p values corrected together (`zoo.compare.statistics`).

    Nothing here asks whether the rows may be compared: `comparable` does.

    Args:
        files: keeps what was read for the next column.

    Returns:
        Name of a row -> its difference. Rows without per-item scores of the metric are left out, as are those that
        share no seed with the baseline.
    """
    files = files or ScoreFiles()

    def read(row: Row) -> dict[str, ItemScores]:
        found = {run.seed: files.scores(run.path, column.task, column.info) for run in row.runs}
        return {seed: scores for seed, scores in found.items() if scores is not None}

    theirs = read(baseline)
    pairs = {}
    for row in rows:
        ours = read(row)
        if seeds := [seed for seed in ours if seed in theirs]:
            pairs[row.name] = [ours[seed] for seed in seeds], [theirs[seed] for seed in seeds]
    return differences(paired_estimates(pairs, key=column.task), baseline.name)
