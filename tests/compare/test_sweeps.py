"""Quality against sampling steps: what ``zoo eval --sweep`` left behind, read, tabled and drawn."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from zoo.compare.leaderboard import build_leaderboard
from zoo.compare.report import make_report
from zoo.compare.rundir import find_runs
from zoo.compare.sweeps import find_sweeps, sweep_rows, sweeps_markdown


def put(run: Path, value: str, passes: float | None, score: float, condition: str = "same", **more: Any) -> None:
    folder = run / "eval" / f"steps={value}"
    folder.mkdir(parents=True)
    metrics = {"score": score, "score_real": 0.6, "frechet": 1 - score, "frechet_real": 0.05, "images": 20.0, **more}
    metrics |= {} if passes is None else {"passes": passes}
    (folder / "metrics.json").write_text(json.dumps({"text-to-image": metrics}))
    said = {"field": "steps", "value": value, "conditions": {"text-to-image": condition}}
    (folder / "sweep.json").write_text(json.dumps(said))


@pytest.fixture
def runs(make_run: Callable[..., Path], tmp_path: Path) -> Path:
    for seed in (0, 1):
        masked = make_run("show-o", seed)
        for steps in (8, 16, 32):
            put(masked, str(steps), float(steps), 0.1 * seed + steps / 100)
    put(make_run("chameleon", 0), "all", 256.0, 0.31)
    put(make_run("transfusion", 0), "10", 20.0, 0.25, condition="other")
    return tmp_path


def test_points_are_means_over_seeds_at_the_passes_that_were_counted(runs: Path) -> None:
    (swept,) = find_sweeps(build_leaderboard(find_runs([runs])).rows)
    found = {(p.row, p.value): p for p in swept.points}
    assert found["show-o", "16"].metrics["score"] == pytest.approx(0.05 + 0.16)
    assert found["show-o", "16"].seeds == 2
    assert found["chameleon", "all"].x == 256
    assert found["transfusion", "10"].x == 20  # two passes a step
    assert [p.value for p in swept.points if p.row == "show-o"] == ["8", "16", "32"]
    assert {p.row for p in swept.points if p.flagged} == {"transfusion"}
    assert [c.metric for c in swept.columns] == ["score", "frechet"]
    assert swept.title == "forward passes an image"


def test_the_table_and_the_page(runs: Path, tmp_path: Path) -> None:
    page = make_report([runs], tmp_path / "out")
    table = page.with_suffix(".md").read_text()
    assert "## text-to-image against steps" in table
    assert "| show-o | 16 | 16 | 2 | 21.0 | 0.790 |" in table
    assert "| chameleon | all | 256 | 1 | 31.0 | 0.690 |" in table
    assert "| transfusion ⚠ | 10 | 20 | 1 | 25.0 | 0.750 |" in table
    assert "| real images | – | – | – | 60.0 | 0.050 |" in table
    html = page.read_text()
    assert html.count("against forward passes an image</title>") == 2
    names = {"report-text-to-image-score-steps.svg", "report-text-to-image-frechet-steps.svg"}
    assert {p.name for p in page.parent.glob("*.svg")} == names
    for name in names:
        tree = ElementTree.fromstring((page.parent / name).read_text())
        assert tree.tag == "{http://www.w3.org/2000/svg}svg"
        told = ["".join(t.itertext()) for t in tree.iter("{http://www.w3.org/2000/svg}title")]
        assert sum(t.startswith(("show-o: ", "chameleon: ", "transfusion: ")) for t in told) == 5
        assert "real images" in "".join(tree.itertext())


def test_reports_without_sweeps_stay_as_they_were(make_run: Callable[..., Path], tmp_path: Path) -> None:
    make_run("clip", 0)
    page = make_report([tmp_path], tmp_path / "out")
    assert "against steps" not in page.read_text() + page.with_suffix(".md").read_text()
    assert not list(page.parent.glob("*.svg"))
    assert sweeps_markdown(()) == ""


def test_what_cannot_be_read_is_passed_over(make_run: Callable[..., Path], tmp_path: Path) -> None:
    run = make_run("show-o", 0)
    put(run, "8", None, 0.2)
    put(run, "16", None, 0.3, frechet=float("nan"))
    for n, text in enumerate(("{", "[]", '{"field": "steps"}', '{"field": "steps", "conditions": {"naming": "x"}}')):
        put(run, f"9{n}", 9.0, 0.2)
        (run / "eval" / f"steps=9{n}" / "sweep.json").write_text(text)
    (swept,) = find_sweeps(build_leaderboard(find_runs([tmp_path])).rows)
    assert [(p.value, p.x) for p in swept.points] == [("8", 8.0), ("16", 16.0)]  # not counted: the field itself
    assert swept.title == "steps"
    assert [line[-1] for line in sweep_rows(swept)] == ["0.800", "–"]


def test_another_field_is_its_own_axis(make_run: Callable[..., Path], tmp_path: Path) -> None:
    run = make_run("show-o", 0)
    for value in ("1.5", "3"):
        put(run, value, 16.0, 0.2)
        file = run / "eval" / f"steps={value}" / "sweep.json"
        file.write_text(file.read_text().replace("steps", "guidance"))
    (swept,) = find_sweeps(build_leaderboard(find_runs([tmp_path])).rows)
    assert [p.x for p in swept.points] == [1.5, 3.0]
    assert (swept.field, swept.title) == ("guidance", "guidance")
