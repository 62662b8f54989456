"""The report: one self-contained HTML page, with CSV and Markdown beside it."""

from __future__ import annotations

import base64
import binascii
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from zoo.compare import charts
from zoo.compare.leaderboard import Column, Leaderboard, Row, build_leaderboard
from zoo.compare.rundir import HASHES, Run, find_runs
from zoo.compare.sweeps import find_sweeps, real_row, sweep_charts, sweep_heads, sweep_rows, sweeps_markdown
from zoo.compare.tables import (
    COSTS,
    cell_text,
    cost_texts,
    cost_values,
    difference_text,
    duration,
    heading,
    short_labels,
    to_csv,
    to_markdown,
)
from zoo.errors import RunError
from zoo.evaluation.naming import normalise

MASK_ROW = re.compile(r"^(?P<head>.*?)\s*(?P<cells>[■·]{2,})$")
PICTURE_LIMIT = 400_000
"""Base64 characters of one sample picture; a larger one is left out, as a page must stay easy to send."""
CURVE_KEYS = {"step", "samples", "tokens", "seconds", "stage", "lr", "loss", "epoch"}


def make_report(
    paths: Iterable[Path | str], out: Path | str, baseline: str | None = None, now: datetime | None = None
) -> Path:
    """Read the runs at or below ``paths`` and write ``report.html``, ``report.csv`` and ``report.md`` into ``out``;
    where runs were evaluated with ``--sweep``, a chart a metric as well, ``report-TASK-METRIC-FIELD.svg``.

    Args:
        out: a folder, made if missing; or a path ending in ``.html``, whose name the other two share.
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
    """Write the three files of a leaderboard that is already built; see `make_report`."""
    page = Path(out)
    if page.suffix.lower() != ".html":
        page = page / "report.html"
    texts = {
        page: render(board, command, now or datetime.now(UTC)),
        page.with_suffix(".csv"): to_csv(board),
        page.with_suffix(".md"): to_markdown(board) + sweeps_markdown(sweeps := find_sweeps(board.rows)),
    }
    for swept in sweeps:
        for column, picture in sweep_charts(swept, _series(board.rows), short_labels(board.rows)):
            name = f"{page.stem}-{swept.task}-{column.metric}-{swept.field}.svg"
            texts[page.with_name(name)] = charts.standalone(picture)
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


def render(board: Leaderboard, command: str, now: datetime) -> str:
    """Return the HTML page. Everything that comes from runs is escaped; the page loads nothing."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("zoo.compare", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(
        colour=charts.colour, heading=heading, cell_text=cell_text, difference_text=difference_text
    )
    series = _series(board.rows)
    labels = short_labels(board.rows)
    svg = Markup  # the charts escape their own text
    context: dict[str, Any] = {
        "board": board,
        "title": _title(board),
        "subtitle": _conditions(board),
        "date": now.strftime("%Y-%m-%d %H:%M UTC"),
        "series": series,
        "labels": labels,
        "cards": _cards(board, series),
        "overview": [(task, [c for c in board.overview if c.task == task]) for task in board.tasks],
        "tasks": [(task, [c for c in board.columns if c.task == task]) for task in board.tasks],
        "cost_heads": COSTS,
        "costs": {row.name: list(zip(cost_texts(row), cost_values(row), strict=True)) for row in board.rows},
        "panels": [
            (c, drawn) for c in board.primary if (drawn := [svg(s) for s in _panels(c, board, series, labels) if s])
        ],
        "sweeps": [
            (
                swept,
                sweep_heads(swept),
                [*sweep_rows(swept), *([real] if (real := real_row(swept)) else [])],
                [svg(picture) for _, picture in sweep_charts(swept, series, labels)],
            )
            for swept in find_sweeps(board.rows)
        ],
        "curves": [(name, svg(s)) for name, s in _curves(board, series, labels)],
        "samples": _samples(board),
        "models": [(row, _wiring(row), [(t, svg(m)) for t, m in _layouts(row)]) for row in board.rows],
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


def _series(rows: Sequence[Row]) -> dict[str, int]:
    """Give every row its colour: controls are grey, the others count up."""
    plain = [row.name for row in rows if not row.control]
    return {row.name: charts.CONTROL if row.control else plain.index(row.name) for row in rows}


def _title(board: Leaderboard) -> str:
    models = [row for row in board.rows if not row.control]
    if not models:
        return "No finished run yet"
    data = _config(models[0].runs[0], "data").get("name")
    count = f"{len(models)} models compared" if len(models) > 1 else "One model"
    return f"{count} on {data}" if data else count


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
    samples = run.number("samples")
    tasks = _config(run, "evaluation").get("tasks")
    items = max((v for c in board.columns if (v := run.metrics.get(c.task, {}).get("images"))), default=None)
    stated = [
        ("Data", " ".join(str(v) for k, v in data.items() if k in ("name", "split_scheme", "language"))),
        ("Scale", str(run.manifest.get("scale") or "")),
        ("Budget", f"{budget.get('value')} {budget.get('unit')}" if budget else ""),
        ("Batch", str(batch or "")),
        ("Samples seen", charts.compact(samples) if samples else ""),
        ("Precision", str(trainer.get("precision") or "")),
        ("Seeds", ", ".join(row.seeds)),
        (
            "Evaluated on",
            f"{_config(run, 'evaluation').get('split', '')} split" + (f", {items:.0f} images" if items else ""),
        ),
        ("Tasks", ", ".join(map(str, tasks)) if isinstance(tasks, Mapping) else ", ".join(board.tasks)),
    ]
    return [(name, text) for name, text in stated if text.strip()]


def _cards(board: Leaderboard, series: Mapping[str, int]) -> list[dict[str, Any]]:
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
                "colour": charts.colour(series[best.name]),
            }
        )
    return cards


def _panels(column: Column, board: Leaderboard, series: Mapping[str, int], labels: Mapping[str, str]) -> list[str]:
    """Draw a metric against FLOPs, against parameters, and its differences to the baseline."""
    rows = [row for row in board.rows if column.key in row.cells]
    y_title = heading(column)
    drawn = []
    for keys, x_title in ((("flops", "total"), "training FLOPs"), (("parameters", "total"), "parameters")):
        points = []
        for row in rows:
            x, cell = row.mean(*keys), row.cells[column.key]
            if x is None:
                continue
            low, high = (cell.mean - cell.spread, cell.mean + cell.spread) if cell.spread is not None else (None, None)
            points.append(
                charts.Point(
                    x=x,
                    y=cell.mean,
                    label=labels[row.name],
                    series=series[row.name],
                    low=low,
                    high=high,
                    hollow=bool(row.flags),
                )
            )
        drawn.append(charts.scatter(points, x_title, y_title, column.text, f"{y_title} against {x_title}"))
    bars = [
        charts.Bar(label=labels[row.name], value=d.mean, low=d.low, high=d.high, series=series[row.name])
        for row in rows
        if (d := row.cells[column.key].difference) is not None
    ]
    against = labels.get(board.baselines.get(column.key, ""), "the baseline")
    text = partial(column.text, signed=True)
    drawn.append(
        charts.forest(bars, f"difference to {against}, 95 % interval over items", text, f"{y_title}: differences")
    )
    return drawn


def _curves(board: Leaderboard, series: Mapping[str, int], labels: Mapping[str, str]) -> list[tuple[str, str]]:
    """Draw one chart an objective; runs without a named objective show their loss."""
    found: dict[str, list[charts.Line]] = {}
    for row in board.rows:
        for run in row.runs:
            names = {
                k for line in run.curve for k, v in line.items() if k not in CURVE_KEYS and isinstance(v, (int, float))
            }
            for name in sorted(names) or ["loss"]:
                points = [
                    (float(line.get("samples", line.get("step", 0))), float(line[name]))
                    for line in run.curve
                    if _number(line.get(name)) and _number(line.get("samples", line.get("step")))
                ]
                label = labels[row.name] + (f", seed {run.seed}" if len(row.runs) > 1 else "")
                found.setdefault(name, []).append(charts.Line(points=points, label=label, series=series[row.name]))
    drawn = [
        (name, charts.lines(curves, "samples seen", name, f"{name} while training")) for name, curves in found.items()
    ]
    return [(name, picture) for name, picture in drawn if picture]


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300


def _samples(board: Leaderboard) -> list[dict[str, Any]]:
    """Bring the outputs of all rows for one item together; the picture is that of a row that saw it."""
    merged: dict[str, dict[str, Any]] = {}
    for row in board.rows:
        for sample in row.runs[0].samples:
            item = merged.setdefault(
                str(sample.get("id")), {"image": "", "reference": str(sample.get("reference", "")), "outputs": []}
            )
            picture = _picture(sample.get("image"))
            if picture and not row.control and not item["image"]:  # a control's pictures are blank
                item["image"] = picture
            output = sample.get("output", "")
            texts = [str(o) for o in output] if isinstance(output, list) else [str(output)]
            shown = sample.get("outputs")
            kinds = (
                [v.get("kind") for v in shown.values() if isinstance(v, Mapping)] if isinstance(shown, Mapping) else []
            )
            right = bool(texts) and normalise(texts[0]) == normalise(item["reference"])
            likelihood_only = kinds == ["likelihood"]
            pictures = [
                (str(v.get("text", item["reference"])), drawn)
                for v in (shown.values() if isinstance(shown, Mapping) else ())
                if isinstance(v, Mapping) and (drawn := _picture(v.get("picture")))
            ]
            item["outputs"].append(
                {"row": row, "texts": texts, "right": right and not likelihood_only, "pictures": pictures}
            )
    return [{"id": key, **item} for key, item in merged.items()]


def _picture(value: Any) -> str:
    """Return base64 that is a PNG for certain, else nothing."""
    if not isinstance(value, str) or len(value) > PICTURE_LIMIT:
        return ""
    try:
        data = base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError):
        return ""
    return base64.b64encode(data).decode() if data.startswith(b"\x89PNG\r\n\x1a\n") else ""


def _wiring(row: Row) -> list[dict[str, Any]]:
    """Return the parts with their share of the parameters."""
    parts = row.runs[0].manifest.get("parts")
    rows = [p for p in parts if isinstance(p, Mapping)] if isinstance(parts, list) else []
    counts = [float(p["parameters"]) if _number(p.get("parameters")) else 0.0 for p in rows]
    most = max([*counts, 1.0])
    return [
        {
            "path": str(p.get("path", "")),
            "name": str(p.get("name", "")),
            "parameters": charts.compact(n),
            "after": not str(p.get("path", "")).endswith("encoder"),  # an encoder reads the data, not the part above it
            "share": round(100 * n / most, 1),
            "state": "no weights" if not n else "trained" if p.get("trained") else "frozen",
        }
        for p, n in zip(rows, counts, strict=True)
    ]


def _layouts(row: Row) -> list[tuple[str, str]]:
    """Split the manifest's layout text into pieces of text, each with the picture of the mask that follows it, if
    any.
    """
    pieces: list[tuple[str, str]] = []
    text: list[str] = []
    cells: list[str] = []
    for line in [*str(row.runs[0].manifest.get("layout") or "").splitlines(), ""]:
        found = MASK_ROW.match(line)
        if found:
            cells.append(found["cells"])
            continue
        if cells:
            pieces.append(
                ("\n".join(text).strip("\n"), charts.mask_picture(cells, f"what each token of {row.name} reads"))
            )
            text, cells = [], []
        text.append(line)
    rest = "\n".join(text).strip("\n")
    return [*pieces, (rest, "")] if rest else pieces


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
    total = sum(v for run in runs if (v := run.number("seconds")) is not None)
    facts = [
        ("Commit", list(dict.fromkeys(commits))),
        ("Hardware", distinct("hardware")),
        ("Versions", distinct("versions")),
        ("Training time, all runs", [duration(total)] if total else []),
    ]
    return [(name, values) for name, values in facts if values]
