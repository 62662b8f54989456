"""The part of a report about scaling: a chart and a table a metric, where families were run with several amounts of
compute (`scaling`)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from zoo.compare import charts
from zoo.compare.leaderboard import Column, Leaderboard
from zoo.compare.plotting import compact
from zoo.compare.rundir import Run
from zoo.compare.scaling import Family, Law, Parity, families, family_name, parity
from zoo.compare.tables import heading

HEADS = (
    "family",
    "points",
    "on the front",
    "seeds",
    "exponent of the law",
    "best",
    "FLOPs of the best",
    "FLOPs to the baseline's best, over the baseline's",
    "the same, as measured",
)
NOTE = (
    "A family is one recipe at several sizes and budgets. Laws, metric = a FLOPs^b, are fitted to the best score for"
    " each amount of compute (filled points); 95 % intervals over seeds and over the scatter around the line."
)


@dataclass(frozen=True)
class Section:
    """One metric.

    Attributes:
        column: the metric.
        families: those with three amounts of compute and more.
        baseline: name of the family that parity is taken to.
        picture: the chart.
    """

    column: Column
    families: tuple[Family, ...]
    baseline: str
    picture: str

    @property
    def lines(self) -> list[tuple[str, ...]]:
        """The table's cells, as `HEADS` names them."""
        base = next(f for f in self.families if f.name == self.baseline)
        return [self._line(family, base) for family in self.families]

    def _line(self, family: Family, base: Family) -> tuple[str, ...]:
        best = family.front[-1]
        found = None if family is base else parity(family, base)
        return (
            family.name,
            str(len(family.points)),
            str(len(family.front)),
            str(len({seed for point in family.points for seed in point.scores})),
            law_text(family.law),
            self.column.text(best.score),
            compact(best.flops),
            "baseline" if family is base else parity_text(found),
            "" if found is None else found.measured,
        )


def sections(board: Leaderboard) -> list[Section]:
    """A section for each primary metric that has a family."""
    runs = [run for row in board.rows for run in row.runs]
    made = [_section(column, board, runs) for column in board.primary]
    return [section for section in made if section is not None]


def _section(column: Column, board: Leaderboard, runs: Sequence[Run]) -> Section | None:
    higher = column.info.higher_is_better
    if higher is None:
        return None
    found = families(runs, column.task, column.metric, higher)
    if not found:
        return None
    row = next((row for row in board.rows if row.name == board.baselines.get(column.key)), None)
    wanted = family_name(row.runs[0]) if row else ""
    baseline = wanted if wanted in {f.name for f in found} else found[0].name
    return Section(column, tuple(found), baseline, chart(column, found))


def chart(column: Column, found: Sequence[Family]) -> str:
    """Both axes logarithmic; a law is drawn over its own front."""
    curves = []
    for number, family in enumerate(found):
        ends = family.front[0].flops, family.front[-1].flops
        law = family.law
        curves.append(
            charts.LawLine(
                points=[(p.flops, p.score) for p in family.points],
                front=[p in family.front for p in family.points],
                texts=[p.label for p in family.points],
                law=None if law is None else ((ends[0], law.score(ends[0])), (ends[1], law.score(ends[1]))),
                label=family.name,
                series=number,
            )
        )
    title = f"{heading(column)} over training FLOPs, with power laws"
    return charts.laws(curves, "training FLOPs", heading(column), column.text, title)


def law_text(law: Law | None) -> str:
    if law is None:
        return "fewer than three points on the front"
    return f"{law.b:+.3f} [{law.low:+.3f}, {law.high:+.3f}]".replace("-", "\u2212") + (
        "" if law.seeds > 1 else ", one seed"
    )


def parity_text(found: Parity | None) -> str:
    if found is None:
        return "no law"
    if math.isnan(found.ratio):
        return "never, by its law"
    high = "∞" if math.isinf(found.high) else f"{found.high:.3g}"
    low = "∞" if math.isinf(found.low) else f"{found.low:.3g}"
    return f"{found.ratio:.3g} [{low}, {high}]" + (", extrapolated" if found.beyond else "")


def to_markdown(found: Sequence[Section]) -> str:
    """The tables, a heading a metric."""
    out = []
    for section in found:
        out.append(f"\n## Scaling: {section.column.task}, {heading(section.column)}\n\n{NOTE}\n")
        out.append("| " + " | ".join(HEADS) + " |")
        out.append("| " + " | ".join("---" for _ in HEADS) + " |")
        out += ["| " + " | ".join(line) + " |" for line in section.lines]
    return "\n".join(out) + ("\n" if out else "")
