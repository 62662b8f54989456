"""The leaderboard as LaTeX: a table a task with intervals under the values, one of costs, one of characteristics.

The file needs ``\\usepackage{booktabs}`` and ``\\usepackage{amssymb}`` (for the check mark), and is meant for
``\\input``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from zoo.compare.characteristics import Characteristics
from zoo.compare.characteristics_table import to_latex as characteristics_latex
from zoo.compare.leaderboard import Cell, Column, Leaderboard, Row
from zoo.compare.tables import (
    COSTS,
    cell_text,
    cost_texts,
    difference_notes,
    difference_text,
    flag_notes,
    heading,
    mark,
)
from zoo.compare.text_tables import latex, tex

MOST_COLUMNS = 5
"""Metrics of one table; a task with more has several."""


def to_latex(board: Leaderboard, characteristics: Mapping[str, Characteristics]) -> str:
    """Return the file. Flagged rows carry a dagger, controls are set in italics, the best value of a column is bold."""
    tables = []
    for task in board.tasks:
        columns = [c for c in board.overview if c.task == task] or [c for c in board.columns if c.task == task]
        for start in range(0, len(columns), MOST_COLUMNS):
            tables.append(_task(board, task, columns[start : start + MOST_COLUMNS], start // MOST_COLUMNS))
    if board.rows:
        rows = [[_name(row), *map(tex, cost_texts(row))] for row in board.rows]
        tables.append(latex(["run", *(tex(c.head) for c in COSTS)], rows, "What training cost.", "tab:cost"))
    if characteristics:
        tables.append(characteristics_latex(characteristics))
    return "% \\usepackage{booktabs}\n% \\usepackage{amssymb}\n\n" + "\n".join(tables)


def _task(board: Leaderboard, task: str, columns: Sequence[Column], number: int) -> str:
    rows: list[list[str]] = []
    for row in board.rows:
        cells = [row.cells.get(column.key) for column in columns]
        if not any(cells):
            continue
        rows.append([_name(row), *(_value(c, cell) for c, cell in zip(columns, cells, strict=True))])
        below = [_interval(c, cell) for c, cell in zip(columns, cells, strict=True)]
        if any(below):
            rows.append(["", *below])
    notes = [*difference_notes(board), *(f"⚠ {note}" for note in flag_notes(board))]
    several = f" ({number + 1})" if number else ""
    label = f"tab:{''.join(c for c in task if c.isalnum() or c == '-')}{number or ''}"
    caption = f"{tex(task)}{several}: {tex(_conditions(board))}"
    return latex(["run", *(tex(heading(c)) for c in columns)], rows, caption, label, notes=tex(" ".join(notes)))


def _conditions(board: Leaderboard) -> str:
    seeds = sorted({len(row.runs) for row in board.rows})
    counted = str(seeds[0]) if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    return f"means over {counted} seeds, ± their standard deviation." if seeds[-1] > 1 else "one seed each."


def _name(row: Row) -> str:
    name = tex(row.name).replace("+", "\\allowbreak+")
    name = f"\\textit{{{name}}}" if row.control else name
    return name + (f" {tex('⚠')}" if row.flags else "")


def _value(column: Column, cell: Cell | None) -> str:
    if cell is None:
        return "--"
    text = tex(cell_text(column, cell))
    return f"\\textbf{{{text}}}" if cell.best else text


def _interval(column: Column, cell: Cell | None) -> str:
    if cell is None or cell.difference is None:
        return ""
    return f"\\scriptsize {tex(difference_text(column, cell) + mark(cell.difference))}"
