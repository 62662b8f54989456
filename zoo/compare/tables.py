"""The leaderboard as text: for the terminal, as CSV and as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isnan
from typing import TYPE_CHECKING, Any

from zoo.compare.leaderboard import Cell, Column, Leaderboard, Row
from zoo.compare.plotting import compact
from zoo.compare.rundir import HASHES
from zoo.compare.statistics import Difference
from zoo.compare.text_tables import csv_text, markdown, md

if TYPE_CHECKING:
    from rich.console import Console


def short_labels(rows: Sequence[Row]) -> dict[str, str]:
    """Return name -> label for charts: the values that were changed, without their fields and without what all rows
    changed alike, as long as that is unique."""
    alike = set.intersection(*(set(row.name.split("+")[1:]) for row in rows)) if len(rows) > 1 else set()

    def label(row: Row) -> str:
        base, *changes = row.name.split("+")
        kept = [c for c in changes if c not in alike and not (row.control and c.startswith("data."))]
        values = [c.partition("=")[2] or c for c in kept]
        return " · ".join([*(["control"] if row.control else []), base, *values])

    labels = {row.name: label(row) for row in rows}
    found = list(labels.values())
    return {name: short if found.count(short) == 1 else name for name, short in labels.items()}


def duration(seconds: float) -> str:
    """Format seconds as 42 s, 3 min 05 s or 2 h 10 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def memory(value: float) -> str:
    """Format bytes as MB or GB (powers of ten)."""
    return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.0f} MB"


def cell_text(column: Column, cell: Cell) -> str:
    """Format a mean with its spread over seeds."""
    spread = f" ± {column.text(cell.spread)}" if cell.spread is not None else ""
    return column.text(cell.mean) + spread


def difference_text(column: Column, cell: Cell) -> str:
    """Format a difference to the baseline with its interval; empty without one."""
    d = cell.difference
    if d is None:
        return ""
    return f"{column.text(d.mean, True)} [{column.text(d.low, True)}, {column.text(d.high, True)}]"


CLEAR, EXPLORATORY = "∗", "◦"


def mark(difference: Difference) -> str:
    """A star for a difference that is clear after correction, a ring for one that rests on one seed."""
    return CLEAR if difference.clear else EXPLORATORY if difference.exploratory else ""


def probability(p: float) -> str:
    """Format a p value: three decimals, or that it is below the smallest of them."""
    return f"{p:.3f}" if p >= 0.001 else "<0.001"


def significance(column: Column, difference: Difference) -> str:
    """What stands behind a difference, in a line: p values, what could have been found, seeds and items."""
    d = difference
    over = "interval over items only (one seed)" if d.exploratory else f"interval over {d.seeds} seeds and items"
    detectable = "" if isnan(d.detectable) else f"; detectable at 80 % power: {column.text(d.detectable)}"
    return (
        f"to {d.baseline}: p {probability(d.p)}, {probability(d.p_adjusted)} after Holm over {d.family}{detectable};"
        f" {over}, {d.items} items in {d.clusters} clusters"
    )


def flag_notes(board: Leaderboard) -> list[str]:
    """Which rows are not comparable, and why."""
    flagged = [row for row in board.rows if row.flags]
    return [f"{row.name} is not comparable with {board.reference}: {'; '.join(row.flags)}" for row in flagged]


def difference_notes(board: Leaderboard) -> list[str]:
    """How to read the differences; nothing where there are none."""
    found = [cell.difference for row in board.rows for cell in row.cells.values() if cell.difference is not None]
    if not found:
        return []
    against = ", ".join(dict.fromkeys(d.baseline for d in found))
    notes = [f"Differences are taken to {against}, item by item, with 95 % bootstrap intervals."]
    if any(d.clear for d in found):
        notes.append(f"{CLEAR} clear: p below 0.05 after Holm's correction over the rows of the column.")
    if any(d.exploratory for d in found):
        notes.append(f"{EXPLORATORY} exploratory: one seed, the interval is over items only.")
    return notes


def heading(column: Column) -> str:
    """Return a column's heading with its unit and direction."""
    arrow = {True: " ↑", False: " ↓", None: ""}[column.info.higher_is_better]
    return column.info.label + (" %" if column.info.percent else "") + arrow


GAP = 2
"""Characters between two columns in the terminal."""


@dataclass(frozen=True)
class Cost:
    """A cost of training: short and long heading, the numbers of the manifest it is, its format, its name in CSV files.

    Attributes:
        brief: shown in the terminal and in Markdown too.
        peak: the largest of the seeds, not their mean.
    """

    head: str
    long: str
    keys: tuple[str, ...]
    text: Callable[[float], str]
    csv: str
    brief: bool = True
    peak: bool = False

    def value(self, row: Row) -> float | None:
        """Of a row: the mean over its seeds, or the largest."""
        if not self.peak:
            return row.mean(*self.keys)
        return max((v for run in row.runs if (v := run.number(*self.keys)) is not None), default=None)


def throughput(samples_per_second: float) -> str:
    """Return a rate as text: whole numbers from ten on, two digits below."""
    return f"{samples_per_second:.0f}" if samples_per_second >= 10 else f"{samples_per_second:.2g}"


COSTS = (
    Cost("trained", "trained parameters", ("parameters", "trainable"), compact, "trained_parameters"),
    Cost("total", "parameters", ("parameters", "total"), compact, "parameters"),
    Cost("FLOPs", "training FLOPs", ("cost", "flops", "total"), compact, "training_flops"),
    Cost("steps", "optimizer steps", ("cost", "steps"), compact, "steps", brief=False),
    Cost("samples", "samples seen", ("cost", "samples"), compact, "samples", brief=False),
    Cost("tokens", "tokens seen", ("cost", "tokens", "total"), compact, "tokens", brief=False),
    Cost("samples/s", "samples a second", ("cost", "samples_per_second"), throughput, "samples_per_second"),
    Cost("time", "training time", ("cost", "seconds", "training"), duration, "seconds"),
    Cost("memory", "peak memory", ("cost", "peak_memory_bytes"), memory, "peak_memory_bytes", peak=True),
)
BRIEF_COSTS = tuple(cost for cost in COSTS if cost.brief)


def cost_texts(row: Row, costs: Sequence[Cost] = COSTS) -> list[str]:
    """Return the costs of a row as text; a dash for what was not recorded."""
    return ["–" if (v := cost.value(row)) is None else cost.text(v) for cost in costs]


def print_leaderboard(board: Leaderboard, console: Console | None = None) -> None:
    """Print one table a task and one of costs, then what must be known to read them."""
    from rich import box
    from rich.console import Console as RichConsole
    from rich.table import Table
    from rich.text import Text

    console = console or RichConsole()
    if not board.rows:
        console.print("No finished run yet.")

    labels = short_labels(board.rows)
    widest = max(map(len, labels.values()), default=0) + 2

    def name(row: Row) -> Text:
        text = Text(labels[row.name], style="dim" if row.control else "bold")
        if row.flags:
            text.append(" !", "bold red")
        return text

    for task in board.tasks:
        found = [c for c in board.columns if c.task == task]
        for number, columns in enumerate(fitting(board, found, console.width - min(widest, 24) - GAP)):
            table = Table(
                title=task + (" (more)" if number else ""),
                box=box.SIMPLE_HEAD,
                title_justify="left",
                title_style="bold",
                padding=(0, 1, 0, 0),
                pad_edge=False,
            )
            table.add_column("run", overflow="fold", min_width=min(24 if len(columns) < 7 else 14, widest))
            for column in columns:
                wide = max(column_width(board, column), len(heading(column)) if len(columns) < 4 else 0)
                table.add_column(_broken(column), justify="right", width=wide)
            for row in board.rows:
                cells = [row.cells.get(c.key) for c in columns]
                if any(cells):
                    texts = [_rich_cell(c, cell) for c, cell in zip(columns, cells, strict=True)]
                    table.add_row(name(row), *texts)
            console.print(table)
    if board.rows:
        table = Table(
            title="cost",
            box=box.SIMPLE_HEAD,
            title_justify="left",
            title_style="bold",
            padding=(0, 1, 0, 0),
            pad_edge=False,
        )
        table.add_column("run", overflow="fold", min_width=min(24, widest))
        for cost in BRIEF_COSTS:
            table.add_column(cost.head, justify="right")
        for row in board.rows:
            table.add_row(name(row), *cost_texts(row, BRIEF_COSTS))
        console.print(table)
    for note in flag_notes(board):
        console.print(Text(f"! {note}", "red"))
    for run, why in board.unfinished:
        console.print(Text(f"! {run.name} (seed {run.seed}) is not in the table: {why}", "yellow"))
    for warning in board.warnings:
        console.print(Text(f"! {warning}", "yellow"))


def column_width(board: Leaderboard, column: Column) -> int:
    """Characters of a column whose numbers stand in one line and whose heading breaks between words."""
    texts = [cell_text(column, cell) for row in board.rows if (cell := row.cells.get(column.key)) is not None]
    return max(map(len, [*texts, *_broken(column).split(" ")]), default=0)


def _broken(column: Column) -> str:
    """The heading, whose unit and arrow stay with its last word."""
    return (
        heading(column)
        .replace(" %", "\N{NO-BREAK SPACE}%")
        .replace(" ↑", "\N{NO-BREAK SPACE}↑")
        .replace(" ↓", "\N{NO-BREAK SPACE}↓")
    )


def fitting(board: Leaderboard, columns: Sequence[Column], width: int) -> list[list[Column]]:
    """Cut a task's columns into tables of at most ``width`` characters, so that no number is cut short."""
    tables: list[list[Column]] = [[]]
    left = width
    for column in columns:
        need = GAP + column_width(board, column)
        if need > left and tables[-1]:
            tables.append([])
            left = width
        tables[-1].append(column)
        left -= need
    return tables


def _rich_cell(column: Column, cell: Cell | None) -> str:
    if cell is None:
        return "–"
    text = cell_text(column, cell)
    return f"[bold green]{text}[/]" if cell.best else text


def to_csv(board: Leaderboard) -> str:
    """Return the table as CSV: one line a run (not a row), full precision, hashes and flags."""
    metrics = [f"{c.task}/{c.metric}" for c in board.columns]
    heads = ["name", "seed", "control", "comparable", "flags", *metrics, *(cost.csv for cost in COSTS)]
    lines: list[list[Any]] = []
    for row in board.rows:
        for run in row.runs:
            values = [run.metrics.get(c.task, {}).get(c.metric) for c in board.columns]
            numbers = [run.number(*cost.keys) for cost in COSTS]
            hashes = [run.hashes.get(h) for h in HASHES]
            start = [row.name, run.seed, int(row.control), int(row.comparable), "; ".join(row.flags)]
            lines.append([*start, *values, *numbers, *hashes, str(run.path)])
    return csv_text([*heads, *(f"hash_{h}" for h in HASHES), "run"], lines)


def differences_csv(board: Leaderboard) -> str:
    """Return every difference to a baseline as CSV, in full precision and in the units of the metric."""
    fields = ("mean", "low", "high", "p", "p_adjusted", "family", "detectable", "items", "clusters", "seeds")
    lines: list[list[Any]] = []
    for row in board.rows:
        for column in board.columns:
            found = row.cells.get(column.key)
            if found is not None and found.difference is not None:
                d = found.difference
                numbers = ["" if isinstance(v := getattr(d, name), float) and isnan(v) else v for name in fields]
                marks = [int(d.exploratory), int(d.clear)]
                lines.append([row.name, column.task, column.metric, d.baseline, *numbers, *marks])
    heads = ["name", "task", "metric", "baseline", *fields, "exploratory", "clear"]
    return csv_text(heads, lines)


def to_markdown(board: Leaderboard) -> str:
    """Return the table as Markdown: one line a row, differences to the baseline beneath the values."""
    heads = ["run", "seeds", *(heading(c) for c in board.columns), *(cost.long for cost in BRIEF_COSTS)]
    lines = []
    for row in board.rows:
        cells = []
        for column in board.columns:
            cell = row.cells.get(column.key)
            text = "–" if cell is None else cell_text(column, cell)
            if cell is not None and cell.best:
                text = f"**{text}**"
            if cell is not None and cell.difference is not None:
                text += f"<br>{difference_text(column, cell)}{mark(cell.difference)}"
            cells.append(text)
        marks = (" (control)" if row.control else "") + (" ⚠" if row.flags else "")
        lines.append([md(row.name) + marks, str(len(row.runs)), *cells, *cost_texts(row, BRIEF_COSTS)])
    notes = [f"⚠ {text}" for text in flag_notes(board)]
    notes += [f"{run.name} (seed {run.seed}) is not in the table: {why}" for run, why in board.unfinished]
    notes += [*board.warnings, *difference_notes(board)]
    return markdown(heads, lines) + "\n" + "".join(f"- {md(note)}\n" for note in notes)
