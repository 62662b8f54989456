"""Grouping, flags, best marks and paired intervals."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path

import pytest

from zoo.compare.leaderboard import build_leaderboard
from zoo.compare.rundir import find_runs
from zoo.errors import RunError

BITS = ("caption-likelihood", "bits_per_byte")


def test_the_demo(demo: Path) -> None:
    board = build_leaderboard(find_runs([demo]))
    assert [row.name for row in board.rows][-1] == "llava+connector=mlp+data.blank_images=true"  # controls come last
    assert all(row.comparable and row.exploratory for row in board.rows)
    assert board.reference == "clip"
    assert board.baselines[BITS] == "llava+connector=mlp+data.blank_images=true"
    assert board.baselines[("retrieval", "i2t_r1")] == "clip"
    assert board.tasks == ("retrieval", "caption-likelihood", "naming")
    assert [c.metric for c in board.primary] == ["i2t_r1", "bits_per_byte", "top1"]
    best = [row.name for row in board.rows if BITS in row.cells and row.cells[BITS].best]
    assert best == ["llava+connector=mlp"]  # the lowest, as lower is better
    assert not any(cell.best for row in board.rows for key, cell in row.cells.items() if key[0] == "retrieval")
    for row in board.rows[1:4]:
        found = row.cells[BITS].difference
        assert found is not None
        assert found.low < found.mean < found.high < 0
        assert found.exploratory
        assert not found.clear  # one seed tells nothing of other seeds, whatever the interval over items
        assert found.p <= found.p_adjusted < 0.05
        assert found.family == 3
        assert found.mean == pytest.approx(row.cells[BITS].mean - board.rows[-1].cells[BITS].mean)
        assert (found.items, found.clusters) == (60, 30)
    assert any("exploratory" in w for w in board.warnings)


def test_seeds_are_one_row(make_run: Callable[..., Path], tmp_path: Path) -> None:
    for seed in (0, 1, 10):
        make_run("llava", seed, quality=0.3 + 0.02 * seed)
    board = build_leaderboard(find_runs([tmp_path]))
    (row,) = board.rows
    assert row.seeds == ("0", "1", "10")
    assert not row.exploratory
    values = [run.metrics[BITS[0]][BITS[1]] for run in row.runs]
    assert row.cells[BITS].mean == pytest.approx(statistics.mean(values))
    assert row.cells[BITS].spread == pytest.approx(statistics.stdev(values))


@pytest.mark.parametrize("kind", ["data", "evaluation", "budget"])
def test_other_conditions_are_flagged_and_not_compared(
    make_run: Callable[..., Path], tmp_path: Path, kind: str
) -> None:
    make_run("llava+connector=linear", quality=0.3)
    other = make_run("llava+connector=mlp", quality=0.9)
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["hashes"][kind] = "ffff" * 4
    (other / "manifest.json").write_text(json.dumps(manifest))
    board = build_leaderboard(find_runs([tmp_path]))
    flagged = board.rows[1]
    assert len(flagged.flags) == 1
    assert flagged.flags[0].startswith(f"other {kind} (ffffffff, not ")
    assert flagged.cells[BITS].difference is None
    assert not any(cell.best for row in board.rows for cell in row.cells.values())


def test_order_is_held_against_the_same_seed(make_run: Callable[..., Path], tmp_path: Path) -> None:
    make_run("a-linear", 0)
    make_run("a-linear", 1)
    make_run("b-mlp", 0)
    make_run("b-mlp", 1)
    assert all(row.comparable for row in build_leaderboard(find_runs([tmp_path])).rows)
    other = next((tmp_path / "outputs" / "b-mlp").glob("seed=1-*")) / "manifest.json"
    manifest = json.loads(other.read_text())
    manifest["hashes"]["order"] = "another"
    other.write_text(json.dumps(manifest))
    assert build_leaderboard(find_runs([tmp_path])).rows[1].flags == ("other sample order at the same seed",)
    make_run("c-qformer", 7)
    assert build_leaderboard(find_runs([tmp_path])).rows[2].flags == ("other seeds (7, not 0, 1)",)


def test_missing_hashes_are_flagged(make_run: Callable[..., Path], tmp_path: Path) -> None:
    make_run("a")
    make_run("b", manifest={"hashes": {}})
    flags = build_leaderboard(find_runs([tmp_path])).rows[1].flags
    assert flags == tuple(f"no {kind} hash recorded" for kind in ("data", "evaluation", "budget", "order"))


def test_runs_of_other_configuration_do_not_share_a_row(make_run: Callable[..., Path], tmp_path: Path) -> None:
    make_run("llava", 0)
    make_run("llava", 1, config={"recipe": {"model": "llava", "optimizer": {"lr": 3e-4}}})
    board = build_leaderboard(find_runs([tmp_path]))
    assert len(board.rows) == 2
    assert all(" #" in row.name for row in board.rows)
    assert any("share a name" in w for w in board.warnings)


def test_how_a_run_was_executed_does_not_split_a_row(make_run: Callable[..., Path], tmp_path: Path) -> None:
    make_run("llava", 0)
    make_run("llava", 1, config={"trainer": {"precision": "fp32", "devices": 2, "log_every": 50}})
    (row,) = build_leaderboard(find_runs([tmp_path])).rows
    assert row.seeds == ("0", "1")


def test_unfinished_runs_are_named(make_run: Callable[..., Path], tmp_path: Path) -> None:
    make_run("clip", towers=True)
    make_run("llava", status="failed", manifest={"error": "OutOfMemoryError: too big"})
    make_run("blip", status="interrupted")
    board = build_leaderboard(find_runs([tmp_path]))
    assert [row.name for row in board.rows] == ["clip"]
    assert {run.name: why for run, why in board.unfinished} == {
        "llava": "failed: OutOfMemoryError: too big",
        "blip": "interrupted",
    }


def test_a_named_baseline(demo: Path) -> None:
    board = build_leaderboard(find_runs([demo]), baseline="llava+connector=linear")
    assert board.reference == "llava+connector=linear"
    assert board.baselines[BITS] == "llava+connector=linear"
    assert ("retrieval", "i2t_r1") not in board.baselines
    rows = {row.name: row for row in board.rows}
    assert rows["llava+connector=linear"].cells[BITS].difference is None
    assert rows["llava+connector=mlp"].cells[BITS].difference is not None
    with pytest.raises(RunError, match=r"'llava\+connector=mpl' is no finished run; did you mean llava\+connector=mlp"):
        build_leaderboard(find_runs([demo]), baseline="llava+connector=mpl")


def test_nothing_finished_is_an_empty_board(make_run: Callable[..., Path], tmp_path: Path) -> None:
    make_run("clip", status="running")
    board = build_leaderboard(find_runs([tmp_path]))
    assert board.rows == ()
    assert len(board.unfinished) == 1
