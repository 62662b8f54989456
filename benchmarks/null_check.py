"""How often intervals over seeds and items are right, simulated on the per-item scores of real runs.

    python benchmarks/null_check.py outputs                                   # every row of three seeds or more
    python benchmarks/null_check.py outputs --match llava --repeats 2000 --tasks question-answering

Prints, for the primary metric of each task: the spread over seeds (of each row, and how much of it runs of the same
seed share), then a table of null checks (a recipe against itself), of coverage between two different recipes, and of
power where a difference of the minimum detectable size is planted; beside other ways of making intervals on the same
simulated runs. zoo/compare/null_check.py says what is simulated, docs/statistics.md what the columns mean.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from zoo.compare.item_scores import DRAWS, ItemScores, ScoreFiles, ScoreTable, generator
from zoo.compare.leaderboard import Column, Row, build_leaderboard
from zoo.compare.null_check import Simulation, seed_spread, simulate
from zoo.compare.rundir import find_runs
from zoo.compare.statistics import LEVEL

Interval = Callable[[ScoreTable, Sequence[int], Sequence[int]], tuple[float, float]]


def over_items(table: ScoreTable, ours: Sequence[int], theirs: Sequence[int]) -> tuple[float, float]:
    """Seeds averaged, clusters resampled: what the report showed before."""
    draws = (table.redrawn[:, list(ours)] - table.redrawn[:, list(theirs)]).mean(1)
    low, high = np.quantile(draws, [LEVEL / 2, 1 - LEVEL / 2])
    return float(low), float(high)


def resampled_seeds(table: ScoreTable, ours: Sequence[int], theirs: Sequence[int]) -> tuple[float, float]:
    """The plain hierarchical bootstrap: seeds and clusters both drawn with replacement."""
    by_seed = table.redrawn[:, list(ours)] - table.redrawn[:, list(theirs)]  # [draws, seeds]
    counts = generator("seeds").multinomial(len(ours), np.full(len(ours), 1 / len(ours)), size=DRAWS)
    draws = (by_seed * counts).sum(1) / len(ours)
    low, high = np.quantile(draws, [LEVEL / 2, 1 - LEVEL / 2])
    return float(low), float(high)


def missed(interval: Interval, simulation: Simulation, ours: list[ItemScores], theirs: list[ItemScores], n: int) -> str:
    """The share of repeats in which an interval did not hold the true difference, and its mean half width."""
    outside, width = 0, 0.0
    for table, baseline, (row, *_), truth in simulation.comparisons(ours, theirs, n):
        low, high = interval(table, row, baseline)
        outside += not low <= truth <= high
        width += (high - low) / 2
    return f"{100 * outside / n:.1f} % (±{width / n:.4f})"


def shared_spread(rows: Sequence[Row], column: Column) -> tuple[float, float]:
    """Return the spread over seeds within rows, and the share of its variance that rows have in common at a seed."""
    seeds = sorted(set.intersection(*({run.seed for run in row.runs} for row in rows)))
    by_seed = [{run.seed: run.metrics[column.task][column.metric] for run in row.runs} for row in rows]
    values = np.array([[found[seed] for seed in seeds] for found in by_seed])
    values -= values.mean(1, keepdims=True)
    freedom = len(seeds) - 1
    within = float((values**2).sum() / (len(rows) * freedom))
    if len(rows) < 2 or not within:
        return within**0.5, 0.0
    rest = float(((values - values.mean(0)) ** 2).sum() / ((len(rows) - 1) * freedom))
    return within**0.5, 1 - rest / within


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--match", default="", help="only rows whose name holds this")
    parser.add_argument("--tasks", default="", help="only these tasks, by commas; default: all")
    parser.add_argument("--repeats", type=int, default=1000)
    parser.add_argument("--seeds", default="2,3,5", help="seeds of a simulated row, by commas")
    parser.add_argument(
        "--rows", type=int, default=5, help="rows beside the baseline where Holm's correction is checked"
    )
    parser.add_argument("--clusters", type=int, default=0, help="of a simulated test set; default: as many as stored")
    parser.add_argument("--shared", type=float, default=0.0, help="share of the seed's variance common to all rows")
    arguments = parser.parse_args()
    board = build_leaderboard([run for run in find_runs(arguments.runs) if arguments.match in run.name])
    tasks = set(filter(None, arguments.tasks.split(",")))
    files = ScoreFiles()
    start = time.process_time()
    for column in board.primary:
        if not column.info.numerator or (tasks and column.task not in tasks):
            continue
        rows = [r for r in board.rows if len(r.runs) > 2 and not r.control and r.has(column.task)]
        groups: dict[tuple[str, ...], list[Row]] = {}
        for row in rows:
            conditions = tuple(row.runs[0].hashes.get(kind, "") for kind in ("data", "evaluation", "budget"))
            groups.setdefault(conditions, []).append(row)
        for members in groups.values():
            report(column, members, files, arguments)
    print(f"\n{arguments.repeats} repeats a line, a third as many for Holm's correction;", end=" ")
    print(f"{time.process_time() - start:.0f} seconds of one core")


def report(column: Column, rows: Sequence[Row], files: ScoreFiles, arguments: argparse.Namespace) -> None:
    """Print all of one metric of rows under equal conditions."""
    scores = {}
    for row in rows:
        found = [files.scores(run.path, column.task, column.info) for run in row.runs]
        scores[row.name] = [s for s in found if s is not None]
    print(f"\n## {column.task}, {column.metric}\n")
    print("| row | seeds | clusters | spread over seeds | of single items | of the seed's own |")
    print("| --- | --- | --- | --- | --- | --- |")
    spreads = {name: seed_spread(runs) for name, runs in scores.items()}
    for name, spread in spreads.items():
        runs = scores[name]
        clusters = ScoreTable.of(runs).clusters
        print(f"| {name} | {len(runs)} | {clusters} | {spread.total:.4f} | {spread.items:.4f} | {spread.own:.4f} |")
    within, shared = shared_spread(rows, column)
    own = float(np.sqrt(np.mean([s.own**2 for s in spreads.values()])))
    print(
        f"\nroot mean square: {within:.4f}, the seed's own {own:.4f}; rows have {100 * shared:.0f} % of the variance in"
    )
    print("common at the same seed\n")
    first, *others = scores.values()
    other = others[0] if others else first
    headings = (
        "seeds",
        "the seed's own spread",
        "level, 1 row (half width)",
        f"level, {arguments.rows} rows, Holm",
        "not covered, two recipes",
        "power at the detectable size (it)",
        "level, items only (half width)",
        "level, seeds and items resampled (half width)",
    )
    print("| " + " | ".join(headings) + " |")
    print("| " + " | ".join("---" for _ in headings) + " |")
    for seeds in map(int, arguments.seeds.split(",")):
        for own_spread in dict.fromkeys((0.0, own)):
            clusters, common = arguments.clusters, arguments.shared
            null = Simulation(seeds=seeds, seed_sd=own_spread, clusters=clusters, shared=common)
            n = arguments.repeats
            one = simulate(first, first, null, n)
            family = simulate(first, first, replace(null, rows=arguments.rows), max(1, n // 3))
            between = simulate(other, first, null, n)
            planted = simulate(first, first, replace(null, shift=one.detectable), n)
            cells = [
                str(seeds),
                f"{own_spread:.4f}",
                f"{100 * one.single:.1f} % (±{one.width:.4f})",
                f"{100 * family.found:.1f} %",
                f"{100 * (1 - between.covered):.1f} %",
                f"{100 * planted.single:.0f} % ({one.detectable:.4f})",
                missed(over_items, null, first, first, n),
                missed(resampled_seeds, null, first, first, n),
            ]
            print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
