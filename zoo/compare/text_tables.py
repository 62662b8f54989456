"""Tables as Markdown, CSV and LaTeX: a heading and rows of text, escaped for each."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

UNICODE = {
    "→": r"$\to$", "↑": r"$\uparrow$", "↓": r"$\downarrow$", "±": r"$\pm$", "−": r"$-$", "–": "--", "—": "---",
    "·": r"$\cdot$", "×": r"$\times$", "✓": r"\checkmark{}", "⚠": r"$\dagger$", "≥": r"$\geq$", "≤": r"$\leq$",
    "<": r"\textless{}", ">": r"\textgreater{}", "∗": "$^{*}$", "◦": r"$^{\circ}$", "…": r"\dots{}", "\u00a0": "~",
}  # fmt: skip
ASCII = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "|": r"\textbar{}", '"': r"\textquotedbl{}",
}  # fmt: skip


def tex(text: str) -> str:
    """Escape text for LaTeX: its special characters, and the signs that the zoo's tables use."""
    signs = {**ASCII, **UNICODE, "\n": " ", "\r": " "}
    return "".join(signs.get(character, character) for character in text)


def md(text: str) -> str:
    """Escape text for a cell of a Markdown table."""
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[bool] | None = None) -> str:
    """A Markdown table of escaped cells; columns are right-aligned but for the first, or as ``right`` says."""
    aligned = right or [n > 0 for n in range(len(heads))]
    lines = [heads, ["---:" if r else "---" for r in aligned], *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def csv_text(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A CSV file; None is an empty cell."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(heads)
    writer.writerows(["" if cell is None else cell for cell in row] for row in rows)
    return buffer.getvalue()


def latex(
    heads: Sequence[str], rows: Sequence[Sequence[str]], caption: str, label: str, columns: str = "", notes: str = ""
) -> str:
    """A floating table with booktabs' rules; cells, caption and notes are LaTeX already (`tex`).

    Args:
        columns: The tabular's column letters; one left and the others right by default.
        notes: Written under the table, in small letters.
    """
    columns = columns or "l" + "r" * (len(heads) - 1)
    body = "\n".join("    " + " & ".join(row) + r" \\" for row in rows)
    under = f"  \\par\\smallskip\\footnotesize {notes}\n" if notes else ""
    return (
        "\\begin{table}[t]\n  \\centering\n"
        f"  \\caption{{{caption}}}\n  \\label{{{label}}}\n"
        f"  \\begin{{tabular}}{{{columns}}}\n    \\toprule\n"
        f"    {' & '.join(heads)} \\\\\n    \\midrule\n{body}\n    \\bottomrule\n"
        f"  \\end{{tabular}}\n{under}\\end{{table}}\n"
    )
