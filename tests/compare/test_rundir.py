"""Reading run directories: what is broken is reported and never fatal."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from zoo.compare.rundir import Run, find_runs
from zoo.errors import RunError


def test_a_whole_run(make_run: Callable[..., Path]) -> None:
    run = Run.read(make_run("clip", 3, towers=True))
    assert (run.name, run.seed, run.status, run.control) == ("clip", "3", "done", False)
    assert run.problems == ()
    assert run.number("cost", "flops", "total") == 4e13
    assert run.number("cost", "nothing") is None
    assert len(run.curve) == 30


def test_found_once_in_order(demo: Path) -> None:
    runs = find_runs([demo / "clip", demo, next(demo.glob("clip/*")) / "manifest.json"])
    assert [r.name for r in runs] == [
        "clip",
        "llava+connector=linear",
        "llava+connector=mlp",
        "llava+connector=mlp+data.blank_images=true",
        "llava+connector=qformer",
    ]


def test_nothing_to_find_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="does not exist"):
        find_runs([tmp_path / "nothing"])
    with pytest.raises(RunError, match="train one first"):
        find_runs([tmp_path])


def test_a_run_killed_while_writing(make_run: Callable[..., Path]) -> None:
    path = make_run("clip", status="running", towers=True)
    with (path / "curve.jsonl").open("a") as file:
        file.write('{"step": 301, "lo')
    run = Run.read(path)
    assert run.problems == ()
    assert len(run.curve) == 30
    assert run.metrics == {}


@pytest.mark.parametrize(
    ("file", "text", "problem"),
    [
        ("manifest.json", "{", "manifest.json is not JSON"),
        ("manifest.json", "[1]", "manifest.json is not a mapping"),
        ("metrics.json", "nonsense", "metrics.json is not JSON"),
        ("run.yaml", "a: [", "run.yaml is not YAML"),
        ("run.yaml", "!!python/object/apply:os.system ['true']", "run.yaml is not YAML"),
        ("curve.jsonl", "x\n{}\n", "1 lines are not JSON"),
        ("samples.json", "{}", "samples.json is not a list"),
    ],
)
def test_broken_files_are_reported(make_run: Callable[..., Path], file: str, text: str, problem: str) -> None:
    path = make_run("clip", towers=True)
    (path / file).write_text(text)
    assert any(problem in p for p in Run.read(path).problems)


def test_odd_values_do_not_pass(make_run: Callable[..., Path]) -> None:
    path = make_run("clip", towers=True)
    (path / "metrics.json").write_text('{"retrieval": {"i2t_r1": NaN, "i2t_r5": "high", "i2t_r10": 0.5}, "x": 3}')
    assert Run.read(path).metrics == {"retrieval": {"i2t_r10": 0.5}}


def test_a_done_run_without_metrics_is_a_problem(make_run: Callable[..., Path]) -> None:
    path = make_run("clip", towers=True)
    (path / "metrics.json").unlink()
    assert Run.read(path).problems == ("metrics.json is missing",)
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["status"] == "done"
