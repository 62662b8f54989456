"""The characteristics table as rows of text: for the terminal, the page, Markdown, CSV and LaTeX. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from zoo.compare.characteristics import GENERATIVE, Characteristics, StageFacts
from zoo.compare.plotting import compact
from zoo.compare.text_tables import csv_text, latex, markdown, md, tex

if TYPE_CHECKING:
    from rich.console import Console

HEADS = (
    "model", "understands", "draws", "segments", "kind", "images", "attention", "trained (frozen)", "parameters",
    "visual tokens",
)  # fmt: skip
HELP = (
    "", "embeds, scores, describes, matches or classifies images", "how it draws images", "marks regions of images",
    "how it learns; what samples can be drawn from comes first", "continuous features and latents, or discrete codes",
    "who reads whom", "what learns in each stage of training, and what does not", "of the whole model",
    "tokens of an image where they meet the text",
)  # fmt: skip

SHORT = {1: "und.", 3: "seg.", 8: "params", 9: "tokens"}
"""Headings on a narrow terminal."""
WIDE = 150
"""Characters from which on the table is one."""


def yes(value: bool) -> str:
    return "✓" if value else "–"


def kind(facts: Characteristics) -> str:
    """Kinds of learning, the generative ones first."""
    generative = [word for word in facts.learns if word in GENERATIVE]
    return ", ".join([*generative, *(word for word in facts.learns if word not in GENERATIVE)]) or "–"


def stage_text(stage: StageFacts, named: bool) -> str:
    """``align: connector (encoder, decoder)``."""
    frozen = f" ({', '.join(stage.frozen)})" if stage.frozen else ""
    text = "all" if not stage.frozen and not any("%" in part for part in stage.trained) else ", ".join(stage.trained)
    return (f"{stage.name}: " if named else "") + text.replace("_", " ") + frozen.replace("_", " ")


def cells(name: str, facts: Characteristics) -> list[str]:
    """One line of the table, in the order of `HEADS`."""
    return [
        name,
        yes(facts.understands),
        facts.draws or "–",
        yes(facts.segments),
        kind(facts),
        facts.images or "–",
        facts.attention or "–",
        "; ".join(stage_text(stage, len(facts.stages) > 1) for stage in facts.stages) or "–",
        compact(facts.parameters),
        "–" if facts.visual_tokens is None else str(facts.visual_tokens),
    ]


def to_markdown(table: Mapping[str, Characteristics]) -> str:
    """The table as Markdown."""
    right = [n >= 8 for n in range(len(HEADS))]
    return markdown(HEADS, [[md(cell) for cell in cells(name, facts)] for name, facts in table.items()], right)


def to_csv(table: Mapping[str, Characteristics]) -> str:
    """The table as CSV: words as in the table, numbers whole, and what the table has no room for."""
    more = ("capabilities", "writes", "drawing_passes", "trained_parameters")
    rows: list[list[Any]] = []
    for name, facts in table.items():
        most = max((stage.parameters for stage in facts.stages), default=None)
        rows.append(
            [
                *cells(name, facts)[:8],
                facts.parameters,
                facts.visual_tokens,
                " ".join(facts.capabilities),
                facts.writes,
                facts.drawing_passes,
                most,
            ]
        )
    return csv_text([*(head.replace(" ", "_") for head in HEADS), *more], rows)


def to_latex(table: Mapping[str, Characteristics]) -> str:
    """The table as LaTeX; text columns wrap."""
    columns = "lccc" + "p{2.6cm}p{2.2cm}p{3.2cm}p{3.6cm}rr"
    rows = [[tex(cell) for cell in cells(name, facts)] for name, facts in table.items()]
    caption = "What the models are. In brackets: what stays frozen."
    return latex([tex(head) for head in HEADS], rows, caption, "tab:characteristics", columns)


def print_table(table: Mapping[str, Characteristics], console: Console | None = None) -> None:
    """Print the table; on a narrow terminal as two, the second with who reads whom and what is trained."""
    from rich import box
    from rich.console import Console as RichConsole
    from rich.table import Table
    from rich.text import Text

    console = console or RichConsole()
    widest = max(map(len, table), default=0)
    parts = (tuple(range(len(HEADS))),) if console.width >= WIDE else ((0, 1, 2, 3, 4, 5, 8, 9), (0, 6, 7))
    least = {0: min(widest, 18), 1: 4, 2: 9, 3: 4, 4: 15, 5: 10, 8: 6, 9: 6}
    for columns in parts:
        shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
        for n in columns:
            shown.add_column(
                HEADS[n] if console.width >= WIDE else SHORT.get(n, HEADS[n]),
                justify="right" if n >= 8 else "center" if n in (1, 3) else "left",
                style="bold" if n == 0 else "",
                min_width=least.get(n),
                overflow="fold",
            )
        for name, facts in table.items():
            line = cells(name, facts)
            shown.add_row(*(Text(line[n]) for n in columns))
        console.print(shown)


def plain_rows(table: Mapping[str, Characteristics]) -> Sequence[Sequence[str]]:
    """All lines of the table."""
    return [cells(name, facts) for name, facts in table.items()]
