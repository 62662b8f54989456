"""The answers as a table in the terminal, as Markdown, and as a section of an HTML page."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from zoo.claims.claim import Claim
from zoo.claims.verdict import NOT_RUN, OPEN, STATES, Answer
from zoo.compare.statistics import LEVEL
from zoo.compare.text_tables import markdown, md
from zoo.errors import RunError
from zoo.evaluation.catalogue import metric_info

if TYPE_CHECKING:
    from rich.console import Console

SEEDS = (0, 1, 2)
"""The seeds of a claim unless the user says others."""

NARROW = 130
"""Columns of a terminal below which the list leaves out what the report has."""

HEADS = ("claim", "system", "compared", "the paper", "here", "answer", "minutes", "command")


def command(claim: Claim, scale: str = "tiny", seeds: Sequence[int] = SEEDS) -> str:
    """What runs a claim."""
    return f"zoo claims run {claim.name} --scale {scale} --seeds {','.join(map(str, seeds))}"


def percent(claim: Claim) -> bool:
    """Whether the quantity is shown times 100."""
    if claim.config.kind not in ("difference", "interaction"):
        return False
    info = metric_info(*claim.config.metric.split("/", 1))
    return info is not None and info.percent


def number(claim: Claim, value: float, signed: bool = True) -> str:
    """A value of the claim's quantity: a gain with its sign, a ratio with ×."""
    ratio = claim.config.kind in ("cost", "parity")
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if ratio:
        return f"{value:.3g}×"
    factor = 100 if percent(claim) else 1
    text = f"{factor * value:+.1f}" if percent(claim) else f"{value:+.3f}"
    return (text if signed else text.lstrip("+")).replace("-", "−")


def quantity(claim: Claim) -> str:
    """What is bounded, and how: ``gain in text-to-image/score ≥ 0``."""
    config, (low, high) = claim.config, claim.bounds
    words = {
        "difference": f"gain in {config.metric}",
        "interaction": f"gain in {config.metric} less that of {_than(claim)}",
        "cost": f"{config.metric}, variant over baseline",
        "parity": f"share of {config.along} for equal {config.metric}",
        "divergence": "loss at the end, baseline less variant",
    }
    if low == -math.inf:
        bounds = f"≤ {number(claim, high, False)}"
    elif high == math.inf:
        bounds = f"≥ {number(claim, low, False)}" if low else "> 0"
    else:
        bounds = f"in {number(claim, low)} .. {number(claim, high)}"
    return f"{words[config.kind]} {bounds}"


def _than(claim: Claim) -> str:
    return " → ".join(arm.label for role, arm in claim.arms.items() if role.startswith("than."))


def compared(claim: Claim) -> str:
    """``causal → both ways``."""
    return f"{claim.arms['baseline'].label} → {claim.arms['variant'].label}"


def found(answer: Answer) -> str:
    """The value with its interval and what it rests on; the reason where there is none."""
    m, claim = answer.measured, answer.claim
    if m is None:
        return answer.reason
    unit = " points" if percent(claim) else ""
    text = f"{number(claim, m.value)}{unit}"
    if m.exact:
        return f"{text}, counted"
    if m.exploratory and claim.config.kind not in ("difference", "interaction"):
        return f"{text}, one seed"
    low, high = m.interval
    over = "items, one seed" if m.exploratory else f"{m.seeds} seeds"
    text += f" [{number(claim, low)}, {number(claim, high)}] over {over}"
    if not m.exploratory:
        text += f", p {answer.p_adjusted:.2g}"
    if answer.state == OPEN and math.isfinite(answer.detectable):
        text += f"; would have found {_detectable(claim, answer.detectable)}"
    return text


def _detectable(claim: Claim, value: float) -> str:
    if claim.config.kind in ("cost", "parity"):
        return f"a factor of {value:.2g}"
    return f"{number(claim, value, False)}{' points' if percent(claim) else ''}"


def arms_text(answer: Answer) -> str:
    """``causal 12.1 ± 0.3; both ways 14.0 ± 0.2``."""
    facts = answer.measured.facts if answer.measured is not None else None
    return "; ".join(f"{label} {text}" for label, text in (facts or {}).items())


def minutes(answer: Answer, seeds: int = len(SEEDS)) -> str:
    """Measured, or expected (~) for ``seeds`` seeds; of runs that come first behind a +."""
    config = answer.claim.config
    if answer.minutes is None or answer.done < answer.runs:
        first = f" + {config.first_minutes:.0f}" if config.first_minutes else ""
        return f"~{seeds * config.minutes:.0f}{first}"
    first = f" + {answer.first_minutes:.0f}" if answer.first_minutes else ""
    return f"{answer.minutes:.0f}{first}"


def row(answer: Answer, scale: str) -> tuple[str, ...]:
    """A line of the table, as ``HEADS``."""
    claim = answer.claim
    here = "; ".join(text for text in (found(answer), arms_text(answer), *answer.settings) if text) or "–"
    return (
        f"{claim.name}: {claim.config.title}",
        claim.config.system,
        f"{compared(claim)}; {quantity(claim)}",
        f"{claim.paper} ({claim.config.source})",
        here,
        answer.state,
        minutes(answer),
        command(claim, scale),
    )


def summary(given: Sequence[Answer]) -> str:
    """``2 reproduced, 3 not at this scale, ...``."""
    counts = Counter(answer.state for answer in given)
    return ", ".join(f"{counts[state]} {state}" for state in STATES if counts[state])


def notes(scale: str) -> list[str]:
    """How the table is to be read, a sentence each."""
    return [
        f"Scale {scale}. The answer follows from the 95 % interval over seeds and items and from p, corrected by Holm"
        f" over all claims with an answer: reproduced = within the claim's bounds and p < {LEVEL}; contradicted ="
        f" outside of them and p < {LEVEL}; not at this scale = neither, with the smallest effect that would have been"
        " found in four of five repetitions. exploratory = one seed.",
        "A gain counts upwards where the variant is better, whatever the metric's direction.",
        "Minutes are those of the claim's runs, + those of runs that come first; claims share both. ~ = expected.",
    ]


def to_markdown(given: Sequence[Answer], scale: str) -> str:
    """The table, and how to read it."""
    lines = [[md(cell) if n < len(HEADS) - 1 else f"`{cell}`" for n, cell in enumerate(row(a, scale))] for a in given]
    table = markdown(HEADS, lines, right=[False] * 6 + [True, False])
    return f"{summary(given)}\n\n{table}\n" + "".join(f"- {md(line)}\n" for line in notes(scale))


def to_html(given: Sequence[Answer], scale: str) -> str:
    """A section of a page, without styles of its own; all texts are escaped."""
    from html import escape

    heads = "".join(f"<th scope=col>{escape(head)}</th>" for head in HEADS[:-1])
    body = []
    for answer in given:
        *cells, run = row(answer, scale)
        state = f'<td data-state="{escape(answer.state)}"><strong>{escape(answer.state)}</strong></td>'
        texts = [f"<td>{escape(cell)}</td>" for cell in cells]
        texts[HEADS.index("answer")] = state
        note = f"<br><small>{escape(answer.claim.config.note)}</small>" if answer.claim.config.note else ""
        texts[0] = f"<td>{escape(cells[0])}{note}<br><code>{escape(run)}</code></td>"
        body.append(f'<tr id="claim-{escape(answer.claim.name)}">{"".join(texts)}</tr>')
    said = "".join(f"<p>{escape(line)}</p>" for line in notes(scale))
    return (
        f'<section id="claims"><h2>Claims</h2><p>{escape(summary(given))}</p>'
        f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'
        f"{said}</section>"
    )


def print_answers(given: Sequence[Answer], scale: str, console: Console | None = None) -> None:
    """The report in the terminal: a block a claim, those that were run first."""
    from rich.console import Console as RichConsole
    from rich.text import Text

    console = console or RichConsole()
    style = {"reproduced": "bold green", "contradicted": "bold red", OPEN: "bold yellow"}
    for answer in sorted(given, key=lambda a: a.state == NOT_RUN):
        claim = answer.claim
        head = Text(f"{claim.name} ", style="bold")
        head.append(answer.state, style=style.get(answer.state, "bold"))
        console.print(head.append(f"  {claim.config.title}"))
        lines = [
            f"{claim.config.system}, {claim.config.source}: {claim.paper}",
            f"{compared(claim)}; {quantity(claim)}",
            found(answer),
            arms_text(answer),
            " ".join(answer.settings),
            f"{minutes(answer)} minutes: {command(claim, scale)}",
        ]
        for line in lines:
            if line:
                console.print(f"    {line}", markup=False, highlight=False)
    console.print(f"\n{summary(given)}", markup=False, highlight=False)


def print_list(given: Sequence[Answer], console: Console | None = None) -> None:
    """A line a claim."""
    from rich import box
    from rich.console import Console as RichConsole
    from rich.table import Table
    from rich.text import Text

    console = console or RichConsole()
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    narrow = console.width < NARROW
    for head in ("claim", "title", *(() if narrow else ("system", "the paper")), "runs", "minutes", "state"):
        wide = head in ("title", "the paper")
        table.add_column(head, justify="right" if head in ("runs", "minutes") else "left", no_wrap=not wide)
    for answer in given:
        claim = answer.claim
        runs = f"{answer.done}/{answer.runs}" if answer.runs else str(expected_runs(claim))
        about = [] if narrow else [claim.config.system, claim.paper]
        cells = [claim.name, claim.config.title, *about, runs, minutes(answer), answer.state]
        table.add_row(*map(Text, cells))
    console.print(table)
    console.print(
        f"{len(given)} claims; minutes on one CPU core for three seeds, + runs that come first, which claims share;"
        " zoo claims run NAME"
    )


def expected_runs(claim: Claim, seeds: int = len(SEEDS)) -> int:
    """Runs of a claim, those that come first left out."""
    points = len(claim.config.points) if claim.config.along == "flops" else 1
    return len(claim.arms) * points * seeds


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Claims</title><style>
:root {{ color-scheme: light dark; font: 15px/1.45 system-ui, sans-serif; }}
body {{ margin: 2rem auto; max-width: 90rem; padding: 0 1rem; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; }}
th, td {{ text-align: left; vertical-align: top; padding: .4rem .6rem; border-bottom: 1px solid #8884; }}
code {{ overflow-wrap: anywhere; }}
</style></head><body>{section}</body></html>
"""


def write_page(given: Sequence[Answer], scale: str, path: Path) -> Path:
    """Write a page that holds the section alone.

    Raises:
        RunError: The file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(PAGE.format(section=to_html(given, scale)), encoding="utf-8")
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror}; choose another file with --html") from error
    return path
