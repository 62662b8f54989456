"""A few of the made-up runs of benchmarks/report_speed.py: every column with scores of items has its difference."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from zoo.compare.leaderboard import build_leaderboard
from zoo.compare.rundir import find_runs


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "report_speed.py"
    spec = importlib.util.spec_from_file_location("report_speed", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_column_follows_from_its_items(benchmark: ModuleType, tmp_path: Path) -> None:
    assert benchmark.make_runs(tmp_path, recipes=4, seeds=2, items=60, samples=1) == 8
    board = build_leaderboard(find_runs([tmp_path]), "llava+connector=baseline")
    assert (len(board.rows), board.tasks) == (4, ("retrieval", "caption-likelihood", "question-answering"))
    compared = 0
    baseline = board.rows[0]
    assert baseline.name == "llava+connector=baseline"
    for row in board.rows[1:]:
        for column in board.columns:
            found = row.cells[column.key].difference
            assert found is not None, column.key
            assert found.mean == pytest.approx(row.cells[column.key].mean - baseline.cells[column.key].mean)
            assert found.low <= found.mean <= found.high
            assert found.p <= found.p_adjusted <= 1
            assert (found.seeds, found.family) == (2, 3)
            assert 0 < found.clusters <= found.items <= 60
            compared += 1
    assert compared == 3 * len(board.columns) > 60
