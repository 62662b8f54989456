"""The leaderboard as text: for the terminal, as CSV and as Markdown."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from zoo.compare.charts import compact
from zoo.compare.leaderboard import Cell, Column, Leaderboard, Row
from zoo.compare.rundir import HASHES

if TYPE_CHECKING:
    from rich.console import Console


def short_labels(rows: Sequence[Row]) -> dict[str, str]:
    """Return name -> label for charts: the values that were changed without their fields, as long as that is unique."""

    def label(row: Row) -> str:
        base, *changes = row.name.split("+")
        changes = [c.partition("=")[2] or c for c in changes if not (row.control and c.startswith("data."))]
        return " · ".join([*(["control"] if row.control else []), base, *changes])

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


def heading(column: Column) -> str:
    """Return a column's heading with its unit and direction."""
    arrow = {True: " ↑", False: " ↓", None: ""}[column.info.higher_is_better]
    return column.info.label + (" %" if column.info.percent else "") + arrow


GAP = 2
"""Characters between two columns in the terminal."""

COSTS: tuple[tuple[str, str], ...] = (
    ("trained", "trained parameters"),
    ("total", "parameters"),
    ("FLOPs", "training FLOPs"),
    ("samples/s", "samples a second"),
    ("time", "training time"),
    ("memory", "peak memory"),
)


def cost_values(row: Row) -> list[float | None]:
    """Return the costs of a row in the order of `COSTS`: means over seeds; the largest peak of memory."""
    peaks = [v for run in row.runs if (v := run.number("peak_memory_bytes")) is not None]
    return [
        row.mean("parameters", "trainable"),
        row.mean("parameters", "total"),
        row.mean("flops", "total"),
        row.mean("samples_per_second"),
        row.mean("seconds"),
        max(peaks, default=None),
    ]


def cost_texts(row: Row) -> list[str]:
    """Return the costs of a row as text; a dash for what was not recorded."""
    formats: tuple[Callable[[float], str], ...] = (compact, compact, compact, throughput, duration, memory)
    return ["–" if v is None else form(v) for form, v in zip(formats, cost_values(row), strict=True)]


def throughput(samples_per_second: float) -> str:
    """Return a rate as text: whole numbers from ten on, two digits below."""
    return f"{samples_per_second:.0f}" if samples_per_second >= 10 else f"{samples_per_second:.2g}"


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
        for short, _ in COSTS:
            table.add_column(short, justify="right")
        for row in board.rows:
            table.add_row(name(row), *cost_texts(row))
        console.print(table)
    for row in board.rows:
        if row.flags:
            console.print(Text(f"! {row.name} is not comparable with {board.reference}: {'; '.join(row.flags)}", "red"))
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
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    metrics = [f"{c.task}/{c.metric}" for c in board.columns]
    costs = ["trained_parameters", "parameters", "training_flops", "samples_per_second", "seconds", "peak_memory_bytes"]
    names = ["name", "seed", "control", "comparable", "flags", *metrics, *costs, *(f"hash_{h}" for h in HASHES)]
    writer.writerow([*names, "run"])
    paths = (
        ("parameters", "trainable"),
        ("parameters", "total"),
        ("flops", "total"),
        ("samples_per_second",),
        ("seconds",),
        ("peak_memory_bytes",),
    )
    for row in board.rows:
        for run in row.runs:
            values = [run.metrics.get(c.task, {}).get(c.metric, "") for c in board.columns]
            numbers = ["" if (v := run.number(*path)) is None else v for path in paths]
            hashes = [run.hashes.get(h, "") for h in HASHES]
            start = [row.name, run.seed, int(row.control), int(row.comparable), "; ".join(row.flags)]
            writer.writerow([*start, *values, *numbers, *hashes, str(run.path)])
    return buffer.getvalue()


def to_markdown(board: Leaderboard) -> str:
    """Return the table as Markdown: one line a row, differences to the baseline beneath the values."""

    def escape(text: str) -> str:
        return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")

    head = ["run", "seeds", *(heading(c) for c in board.columns), *(long for _, long in COSTS)]
    out = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    for row in board.rows:
        cells = []
        for column in board.columns:
            cell = row.cells.get(column.key)
            text = "–" if cell is None else cell_text(column, cell)
            if cell is not None and cell.best:
                text = f"**{text}**"
            if cell is not None and cell.difference is not None:
                text += f"<br>{difference_text(column, cell)}"
            cells.append(text)
        marks = (" (control)" if row.control else "") + (" ⚠" if row.flags else "")
        out.append("| " + " | ".join([escape(row.name) + marks, str(len(row.runs)), *cells, *cost_texts(row)]) + " |")
    notes = [
        f"⚠ {row.name} is not comparable with {board.reference}: {'; '.join(row.flags)}"
        for row in board.rows
        if row.flags
    ]
    notes += [f"{run.name} (seed {run.seed}) is not in the table: {why}" for run, why in board.unfinished]
    notes += list(board.warnings)
    against = set(board.baselines.values())
    if against:
        notes.append(
            f"Differences are taken to {', '.join(sorted(against))}: 95 % paired bootstrap intervals over items."
        )
    return "\n".join([*out, "", *(f"- {escape(note)}" for note in notes)]) + "\n"
