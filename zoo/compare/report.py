"""The report: one self-contained HTML page, with CSV, Markdown and LaTeX beside it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from zoo.compare import characteristics_table, figures, models_section, scaling_section
from zoo.compare.characteristics import Characteristics
from zoo.compare.latex import to_latex
from zoo.compare.leaderboard import Leaderboard, Row, build_leaderboard
from zoo.compare.plotting import colour, compact, shape, standalone
from zoo.compare.rundir import HASHES, Run, find_runs
from zoo.compare.sweeps import find_sweeps, real_row, sweep_charts, sweep_heads, sweep_rows, sweeps_markdown
from zoo.compare.tables import (
    COSTS,
    cell_text,
    cost_texts,
    difference_text,
    differences_csv,
    duration,
    heading,
    mark,
    probability,
    short_labels,
    significance,
    to_csv,
    to_markdown,
)
from zoo.errors import RunError


def make_report(
    paths: Iterable[Path | str], out: Path | str, baseline: str | None = None, now: datetime | None = None
) -> Path:
    """Read the runs at or below ``paths`` and write the report into ``out``: see `write_report`.

    Args:
        out: a folder, made if missing; or a path ending in ``.html``, whose name the other files share.
        baseline: name of the row that differences are taken to; see `build_leaderboard`.
        now: the date on the page.

    Returns:
        The path of the page.

    Raises:
        RunError: a path has no run, the baseline is unknown, or ``out`` cannot be written.
    """
    given = [str(p) for p in paths]
    board = build_leaderboard(find_runs(given), baseline)
    return write_report(board, out, command=report_command(given, baseline), now=now)


def write_report(board: Leaderboard, out: Path | str, command: str = "", now: datetime | None = None) -> Path:
    """Write the page and its tables: ``report.html``, ``report.csv`` (a line a run), ``report-differences.csv``,
    ``report-characteristics.csv``, ``report.md`` and ``report.tex``; where runs were evaluated with ``--sweep``, a
    chart a metric as well, ``report-TASK-METRIC-FIELD.svg``. Arguments and errors as `make_report`.
    """
    page = Path(out)
    if page.suffix.lower() != ".html":
        page = page / "report.html"
    facts = models_section.characteristics(board.rows)
    sweeps = find_sweeps(board.rows)
    series, labels = figures.colours(board.rows), short_labels(board.rows)
    swept = [(s, sweep_charts(s, series, labels)) for s in sweeps]
    scaled = scaling_section.sections(board)
    described = f"\n## Models\n\n{characteristics_table.to_markdown(facts)}" if facts else ""
    texts = {
        page: render(board, command, now or datetime.now(UTC), facts, swept, scaled),
        page.with_suffix(".csv"): to_csv(board),
        page.with_suffix(".md"): to_markdown(board)
        + sweeps_markdown(sweeps)
        + scaling_section.to_markdown(scaled)
        + described,
        page.with_suffix(".tex"): to_latex(board, facts),
        page.with_name(f"{page.stem}-differences.csv"): differences_csv(board),
    }
    if facts:
        texts[page.with_name(f"{page.stem}-characteristics.csv")] = characteristics_table.to_csv(facts)
    for one, pictures in swept:
        for column, picture in pictures:
            name = f"{page.stem}-{one.task}-{column.metric}-{one.field}.svg"
            texts[page.with_name(name)] = standalone(picture)
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
        for path, text in texts.items():
            temporary = path.with_name(path.name + ".tmp")
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, path)
    except OSError as error:
        raise RunError(
            f"cannot write the report to {page.parent}: {error.strerror or error}; choose another folder"
        ) from error
    return page


def render(
    board: Leaderboard,
    command: str,
    now: datetime,
    facts: Mapping[str, Characteristics],
    swept: Sequence[tuple[Any, Sequence[tuple[Any, str]]]],
    scaled: Sequence[scaling_section.Section] = (),
) -> str:
    """Return the HTML page. Everything that comes from runs is escaped; the page loads nothing."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    from zoo.claims.on_page import claims_html

    environment = Environment(
        loader=PackageLoader("zoo.compare", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(
        colour=colour,
        shape=shape,
        heading=heading,
        cell_text=cell_text,
        difference_text=difference_text,
        significance=significance,
        probability=probability,
        mark=mark,
        svg=Markup,  # the charts escape their own text
    )
    environment.filters["brief"] = lambda flag: str(flag).partition(" (")[0]
    series = figures.colours(board.rows)
    labels = short_labels(board.rows)
    outputs, sampled = models_section.samples(board)
    curves, curves_left = figures.training(board, series, labels)
    context: dict[str, Any] = {
        "board": board,
        "title": _title(board),
        "subtitle": _conditions(board),
        "date": now.strftime("%Y-%m-%d %H:%M UTC"),
        "series": series,
        "labels": labels,
        "common": _common([row.name for row in board.rows]),
        "cards": _cards(board),
        "overview": [(task, [c for c in board.overview if c.task == task]) for task in board.tasks],
        "tasks": [(task, [c for c in board.columns if c.task == task]) for task in board.tasks],
        "cost_heads": COSTS,
        "costs": {
            row.name: list(zip(cost_texts(row), (c.value(row) for c in COSTS), strict=True)) for row in board.rows
        },
        "panels": [(c, figures.trade_offs(c, board, facts, series, labels)) for c in board.primary],
        "forests": [(c, *figures.differences(c, board, series, labels)) for c in board.primary],
        "sweeps": [
            (
                one,
                sweep_heads(one),
                [*sweep_rows(one), *([real] if (real := real_row(one)) else [])],
                [picture for _, picture in pictures],
            )
            for one, pictures in swept
        ],
        "scaling": scaled,
        "scaling_heads": scaling_section.HEADS,
        "scaling_note": scaling_section.NOTE,
        "claims": claims_html([run for row in board.rows for run in row.runs]),
        "curves": curves,
        "curves_left": curves_left,
        "unknown": [row.name for row in board.rows if row.name not in facts] if facts else [],
        "samples": outputs,
        "sampled": sampled,
        "models": models_section.models(board, facts),
        "facts_heads": list(zip(characteristics_table.HEADS, characteristics_table.HELP, strict=True)),
        "facts_rows": characteristics_table.plain_rows(facts),
        "facts_numbers": {
            n: (c.parameters, "" if c.visual_tokens is None else c.visual_tokens) for n, c in facts.items()
        },
        "manifests": models_section.manifests(board),
        "hash_names": HASHES,
        "hashes": {row.name: _hashes(row) for row in board.rows},
        "licences": sorted(
            {str(run.manifest["licence"]) for row in board.rows for run in row.runs if run.manifest.get("licence")}
        ),
        "facts": _facts(board),
        "commands": list(dict.fromkeys(str(r.manifest.get("command", "")) for row in board.rows for r in row.runs)),
        "report_command": command,
    }
    return environment.get_template("report.html.j2").render(context)


def report_command(paths: Sequence[str], baseline: str | None) -> str:
    import shlex

    return shlex.join(["zoo", "report", *paths, *(["--baseline", baseline] if baseline else [])])


def _title(board: Leaderboard) -> str:
    models = [row for row in board.rows if not row.control]
    if not models:
        return "No finished run yet"
    data = _config(models[0].runs[0], "data").get("name")
    count = f"{len(models)} models compared" if len(models) > 1 else "One model"
    return f"{count} on {data}" if data else count


def _common(names: Sequence[str]) -> list[str]:
    """The changes that stand in the name of every row, of several: no row differs by them."""
    changes = [name.split("+")[1:] for name in names]
    return [part for part in changes[0] if all(part in other for other in changes)] if len(names) > 1 else []


def _config(run: Run, key: str) -> Mapping[str, Any]:
    found = run.config.get(key)
    return found if isinstance(found, Mapping) else {}


def _conditions(board: Leaderboard) -> list[tuple[str, str]]:
    """State the conditions of the reference row: what every comparable row shares."""
    row = next((row for row in board.rows if row.name == board.reference), None)
    if row is None:
        return []
    run = row.runs[0]
    data, budget, trainer = _config(run, "data"), _config(run, "budget"), _config(run, "trainer")
    batch = run.manifest.get("batch_size", run.config.get("batch_size"))
    samples = run.number("cost", "samples")
    tasks = _config(run, "evaluation").get("tasks")
    items = max((v for c in board.columns if (v := run.metrics.get(c.task, {}).get("images"))), default=None)
    stated = [
        ("Data", " ".join(str(v) for k, v in data.items() if k in ("name", "split_scheme", "language"))),
        ("Scale", str(run.manifest.get("scale") or "")),
        ("Budget", f"{budget.get('value')} {budget.get('unit')}" if budget else ""),
        ("Batch", str(batch or "")),
        ("Samples seen", compact(samples) if samples else ""),
        ("Precision", str(trainer.get("precision") or "")),
        ("Seeds", ", ".join(row.seeds)),
        (
            "Evaluated on",
            f"{_config(run, 'evaluation').get('split', '')} split" + (f", {items:.0f} images" if items else ""),
        ),
        ("Tasks", ", ".join(map(str, tasks)) if isinstance(tasks, Mapping) else ", ".join(board.tasks)),
    ]
    return [(name, text) for name, text in stated if text.strip()]


def _cards(board: Leaderboard) -> list[dict[str, Any]]:
    """Say in one line a task which row is ahead, by the primary metric."""
    cards = []
    for column in board.primary:
        fit = [r for r in board.rows if column.key in r.cells and r.comparable and not r.control]
        if not fit:
            continue
        sign = -1 if column.info.higher_is_better is False else 1
        best = max(fit, key=lambda row: sign * row.cells[column.key].mean)
        cell = best.cells[column.key]
        cards.append(
            {
                "column": column,
                "row": best,
                "text": cell_text(column, cell) + (" %" if column.info.percent else ""),
                "difference": difference_text(column, cell),
                "against": cell.difference.baseline if cell.difference else "",
                "alone": len(fit) == 1,
                "count": len(fit),
            }
        )
    return cards


def _hashes(row: Row) -> dict[str, str]:
    return {
        kind: ", ".join(dict.fromkeys((run.hashes.get(kind) or "none")[:12] for run in row.runs)) for kind in HASHES
    }


def _facts(board: Leaderboard) -> list[tuple[str, list[str]]]:
    """List what the runs ran on, each distinct value once."""
    runs = [run for row in board.rows for run in row.runs]

    def flat(value: Any) -> str:
        if isinstance(value, Mapping):
            return ", ".join(f"{k} {flat(v)}" for k, v in value.items())
        if isinstance(value, list):
            return " and ".join(flat(v) for v in value)
        return str(value)

    def distinct(key: str) -> list[str]:
        return list(dict.fromkeys(flat(v) for run in runs if (v := run.manifest.get(key))))

    commits = []
    for run in runs:
        git = run.manifest.get("git")
        if isinstance(git, Mapping) and git.get("commit"):
            commits.append(str(git["commit"])[:12] + (" with uncommitted changes" if git.get("dirty") else ""))
    total = sum(v for run in runs if (v := run.number("cost", "seconds", "training")) is not None)
    facts = [
        ("Commit", list(dict.fromkeys(commits))),
        ("Hardware", distinct("hardware")),
        ("Versions", distinct("versions")),
        ("Training time, all runs", [duration(total)] if total else []),
    ]
    return [(name, values) for name, values in facts if values]
