"""Intervals, p values and corrections against theory, tables and simulation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from zoo.compare.item_scores import ItemScores, ScoreFiles, ScoreTable
from zoo.compare.leaderboard import Row, build_leaderboard, comparable
from zoo.compare.null_check import Simulation, seed_spread, simulate
from zoo.compare.rundir import Run, find_runs
from zoo.compare.statistics import LEVEL, Estimate, differences, estimate, holm, paired_estimates
from zoo.evaluation.catalogue import MetricInfo

BITS = ("caption-likelihood", "bits_per_byte")


def table(*runs: np.ndarray, clusters: np.ndarray | None = None) -> ScoreTable:
    """A table of runs [items] whose metric is a mean."""
    ids = [f"{n:05d}" for n in range(len(runs[0]))]
    names = None if clusters is None else [str(c) for c in clusters]
    return ScoreTable.of([ItemScores.of(ids, run, clusters=names) for run in runs], "x")


def half_width(found: Estimate | None) -> float:
    assert found is not None
    low, high = found.interval()
    return (high - low) / 2


def test_items_alone_as_normal_theory_has_it() -> None:
    rng = np.random.default_rng(0)
    hard = rng.normal(size=400) * 5  # shared between the two: pairing must remove it
    ours, theirs = hard + 1 + rng.normal(size=400), hard + rng.normal(size=400)
    found = estimate(table(ours, theirs), [0], [1])
    assert found is not None
    d = ours - theirs
    assert found.mean == pytest.approx(d.mean())
    assert half_width(found) == pytest.approx(1.96 * d.std(ddof=1) / 20, rel=0.06)
    assert (found.items, found.clusters, found.seeds) == (400, 400, 1)
    again = estimate(table(ours, theirs), [0], [1])
    assert again is not None
    np.testing.assert_array_equal(found.errors, again.errors)


def test_few_clusters_have_students_width() -> None:
    d = np.random.default_rng(2).normal(size=8)
    widths = []
    for shift in range(6):  # other draws for every key
        ids = [str(n) for n in range(8)]
        runs = [ItemScores.of(ids, d), ItemScores.of(ids, np.zeros(8))]
        widths.append(half_width(estimate(ScoreTable.of(runs, str(shift)), [0], [1])))
    assert np.mean(widths) == pytest.approx(2.365 * d.std(ddof=1) / np.sqrt(8), rel=0.12)  # t(7)


def test_clusters_are_drawn_together() -> None:
    shift = np.repeat(np.random.default_rng(1).normal(size=40), 10)  # ten items of a cluster say one thing
    alone = estimate(table(shift, np.zeros(400)), [0], [1])
    together = estimate(table(shift, np.zeros(400), clusters=np.arange(400) // 10), [0], [1])
    assert together is not None
    assert (together.items, together.clusters) == (400, 40)
    assert half_width(together) / half_width(alone) == pytest.approx(np.sqrt(10), rel=0.15)


def test_a_ratio_weighs_by_the_denominator_on_the_items_both_have() -> None:
    ours = ItemScores.of(["only ours", "b", "a"], [100.0, 9.0, 8.0], [1.0, 3.0, 2.0])
    theirs = ItemScores.of(["a", "b"], [4.0, 6.0], [2.0, 3.0])
    found = paired_estimates({"row": ([ours], [theirs])}, "k")["row"]
    assert found.mean == pytest.approx(17 / 5 - 10 / 5)
    assert found.items == 2
    lone = ItemScores.of(["a"], [1.0])
    assert paired_estimates({"row": ([lone], [lone])}, "k") == {}


def test_items_without_a_denominator_do_not_count() -> None:
    ids = [f"{n:02d}" for n in range(30)]
    kind = [1.0] * 20 + [0.0] * 10
    runs = [ItemScores.of(ids, [v * k for k in kind], kind) for v in (0.5, 0.25)]
    found = estimate(ScoreTable.of(runs), [0], [1])
    assert found is not None
    assert (found.items, found.clusters, found.mean) == (20, 20, 0.25)


@pytest.mark.parametrize(("seeds", "t"), [(2, 12.706), (3, 4.303), (5, 2.776), (10, 2.262)])
def test_seeds_alone_have_students_width(seeds: int, t: float) -> None:
    rng = np.random.default_rng(seeds)
    hard = rng.normal(size=200)
    effects = rng.normal(size=(2, seeds))
    runs = [hard + e for e in effects.reshape(-1)]  # a seed moves all items alike: items say nothing of it
    found = estimate(table(*runs), range(seeds), range(seeds, 2 * seeds))
    assert found is not None
    d = effects[0] - effects[1]
    assert found.mean == pytest.approx(d.mean())
    assert half_width(found) == pytest.approx(t * d.std(ddof=1) / np.sqrt(seeds), rel=0.05)


def test_noise_of_seeds_on_single_items_is_counted_once() -> None:
    """Ten seeds that move items independently: the interval is Student's over seeds, not wider by that over items."""
    rng = np.random.default_rng(4)
    ratios = []
    for _ in range(20):
        runs = rng.normal(size=(20, 300))
        found = estimate(table(*runs), range(10), range(10, 20))
        d = runs[:10].mean(1) - runs[10:].mean(1)
        ratios.append(half_width(found) / (2.262 * d.std(ddof=1) / np.sqrt(10)))
    assert np.median(ratios) == pytest.approx(1.0, abs=0.06)  # 1.4 were it counted twice


def test_what_recipes_do_to_items_adds_to_the_seeds() -> None:
    rng = np.random.default_rng(5)
    taste = rng.normal(size=400)  # the two recipes differ on items, whatever the seed
    effects = 0.01 * rng.normal(size=10)
    found = estimate(table(*(taste + e for e in effects), *np.zeros((10, 400))), range(10), range(10, 20))
    assert half_width(found) == pytest.approx(1.96 * taste.std(ddof=1) / 20, rel=0.08)


def test_seeds_that_agree_by_chance_are_not_certain() -> None:
    """Three seeds with the same number of hits on different items."""
    rng = np.random.default_rng(6)
    runs = [rng.permutation(np.repeat([1.0, 0.0], [40 + 4 * (n < 3), 60 - 4 * (n < 3)])) for n in range(6)]
    found = estimate(table(*runs), range(3), range(3, 6))
    assert found is not None
    assert found.mean == pytest.approx(0.04)
    noise = np.sqrt(2 * 0.24 / 100 / 3)  # of a mean over three seeds of a difference of two shares
    assert half_width(found) == pytest.approx(1.96 * noise, rel=0.1)
    assert found.p > 0.2


@pytest.mark.parametrize("seeds", [1, 3])
def test_p_agrees_with_the_interval(seeds: int) -> None:
    rng = np.random.default_rng(7)
    runs = rng.normal(size=(2 * seeds, 60))
    verdicts = set()
    for shift in np.linspace(-1.5, 1.5, 61):
        shifted = runs.copy()
        shifted[:seeds] += shift
        found = estimate(table(*shifted), range(seeds), range(seeds, 2 * seeds))
        assert found is not None
        low, high = found.interval()
        assert (found.p < LEVEL) == (low > 0 or high < 0)
        verdicts.add(found.p < LEVEL)
    assert verdicts == {True, False}


def test_equal_rows_do_not_differ() -> None:
    run = np.random.default_rng(8).normal(size=50)
    found = estimate(table(run, run, run, run), [0, 1], [2, 3])
    assert found is not None
    assert (found.mean, found.p, found.interval()) == (0.0, 1.0, (0.0, 0.0))


def test_holm() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_one_seed_is_a_family_of_its_own() -> None:
    errors = np.sort(np.random.default_rng(9).normal(size=16000))
    several = {f"row {n}": Estimate(mean, errors, 100, 100, 3) for n, mean in enumerate((2.3, 2.6, 0.1))}
    found = differences({**several, "lone": Estimate(9.0, errors[::8], 100, 100, 1)}, "base")
    assert [d.family for d in found.values()] == [3, 3, 3, 1]
    assert found["row 0"].p < LEVEL
    assert not found["row 0"].exploratory
    assert [d.clear for d in found.values()] == [True, True, False, False]
    assert found["row 1"].p_adjusted == pytest.approx(3 * found["row 1"].p)
    assert found["row 0"].p_adjusted == pytest.approx(2 * found["row 0"].p)
    assert found["lone"].exploratory
    assert found["lone"].p_adjusted < 0.01
    assert found["row 2"].detectable == pytest.approx(2.394 + 0.842, rel=0.03)  # z at 0.05 / 3, two-sided, and at 80 %
    assert found["lone"].detectable == pytest.approx(1.96 + 0.842, rel=0.05)
    assert {d.baseline for d in found.values()} == {"base"}


def stored(seeds: int = 3, items: int = 200) -> list[ItemScores]:
    """Runs of one recipe that answer items right or wrong; seeds disagree on some of them."""
    rng = np.random.default_rng(10)
    easy = rng.beta(0.7, 0.9, size=items)
    ids = [f"{n:04d}" for n in range(items)]
    clusters = [str(n // 2) for n in range(items)]
    return [ItemScores.of(ids, (rng.random(items) < easy).astype(float), clusters=clusters) for _ in range(seeds)]


@pytest.mark.parametrize("seed_sd", [0.0, 0.03])
def test_a_recipe_against_itself_differs_no_more_often_than_the_level(seed_sd: float) -> None:
    null = Simulation(seeds=3, seed_sd=seed_sd)
    few = simulate(stored(), stored(), null, repeats=20)
    assert few.found * 20 <= 4  # more than four of twenty have a chance of 0.3 % at the level
    many = simulate(stored(), stored(), null, repeats=250)
    assert many.found <= LEVEL + many.margin
    assert many.covered >= 1 - LEVEL - many.margin
    family = simulate(stored(), stored(), Simulation(seeds=3, seed_sd=seed_sd, rows=4), repeats=60)
    assert family.found <= LEVEL + family.margin


def test_one_seed_alone_would_find_what_is_not_there() -> None:
    """Why one seed is never clear: were it, most of these equal recipes would differ."""
    assert simulate(stored(), stored(), Simulation(seeds=1, seed_sd=0.1), repeats=100).single > 0.3


@pytest.mark.parametrize("seeds", [3, 5])
def test_a_difference_of_the_detectable_size_is_found(seeds: int) -> None:
    null = simulate(stored(), stored(), Simulation(seeds=seeds, seed_sd=0.03), repeats=100)
    planted = Simulation(seeds=seeds, seed_sd=0.03, shift=null.detectable)
    outcome = simulate(stored(), stored(), planted, repeats=250)
    assert outcome.found == pytest.approx(0.8, abs=0.08)
    assert outcome.covered >= 1 - LEVEL - outcome.margin


def test_the_spread_over_seeds_is_split() -> None:
    rng = np.random.default_rng(11)
    ids = [f"{n:04d}" for n in range(500)]
    runs = [ItemScores.of(ids, rng.normal(size=500) + 0.2 * rng.normal()) for _ in range(200)]
    spread = seed_spread(runs)
    assert spread.items == pytest.approx(1 / np.sqrt(500), rel=0.05)
    assert spread.own == pytest.approx(0.2, rel=0.15)
    assert spread.total**2 == pytest.approx(spread.items**2 + spread.own**2)


def test_reading_scores(tmp_path: Path) -> None:
    info = MetricInfo(label="x", numerator="a", denominator="b")
    (tmp_path / "items").mkdir()
    path = tmp_path / "items" / "task.parquet"
    pq.write_table(pa.table({"item": ["q", "p", "r"], "a": [1.0, None, 3.0], "b": [1, 2, 4], "flag": [True] * 3}), path)
    files = ScoreFiles()
    found = files.scores(tmp_path, "task", info)
    assert found is not None
    assert (
        found.items.ids.tolist() == found.items.clusters.tolist() == ["q", "r"]
    )  # an item without a value is left out
    assert found.numerators.tolist() == [1.0, 3.0]
    assert found.denominators.tolist() == [1.0, 4.0]
    counted = files.scores(tmp_path, "task", MetricInfo(label="y", numerator="flag"))
    assert counted is not None
    assert counted.numerators.tolist() == counted.denominators.tolist() == [1.0] * 3
    assert files.scores(tmp_path, "task", MetricInfo(label="z", numerator="absent")) is None
    assert files.scores(tmp_path, "task", MetricInfo(label="median")) is None
    assert files.scores(tmp_path, "../items/task", info) is not None  # the name alone counts
    assert files.scores(tmp_path, "other", info) is None
    (tmp_path / "items" / "broken.parquet").write_bytes(b"PAR1")
    assert files.scores(tmp_path, "broken", info) is None


def test_the_leaderboard_pairs_seeds(make_run: Callable[..., Path], tmp_path: Path) -> None:
    for seed in (0, 1, 2):
        make_run("base", seed, quality=0.3)
        make_run("better", seed, quality=0.6)
    make_run("same", 0, quality=0.3)
    make_run("same", 1, quality=0.3)
    make_run("lone", 1, quality=0.9)
    board = build_leaderboard(find_runs([tmp_path]), baseline="base")
    rows = {row.name: row for row in board.rows}
    found = {name: row.cells[BITS].difference for name, row in rows.items()}
    assert found["base"] is None
    better, same, lone = found["better"], found["same"], found["lone"]
    assert better is not None
    assert same is not None
    assert lone is not None
    assert better.mean == pytest.approx(rows["better"].cells[BITS].mean - rows["base"].cells[BITS].mean)
    assert (better.seeds, same.seeds, lone.seeds) == (3, 2, 1)
    assert (better.family, same.family, lone.family) == (2, 2, 1)
    assert better.clear
    assert better.low < better.mean < better.high < 0 < better.detectable
    assert not same.clear
    assert lone.exploratory
    assert not lone.clear
    assert lone.high < 0
    assert better.p <= better.p_adjusted < LEVEL
    values = [
        {r.seed: r.metrics[BITS[0]][BITS[1]] for r in rows[name].runs if r.seed in ("0", "1")}
        for name in ("same", "base")
    ]
    assert same.mean == pytest.approx(sum(values[0][s] - values[1][s] for s in ("0", "1")) / 2)


def test_missing_items_are_missing_for_both(make_run: Callable[..., Path], tmp_path: Path) -> None:
    make_run("base", quality=0.3)
    make_run("whole", quality=0.5)
    short = make_run("short", quality=0.5) / "items" / "caption-likelihood.parquet"
    pq.write_table(pq.read_table(short).slice(10), short)
    board = build_leaderboard(find_runs([tmp_path]), baseline="base")
    found = {row.name: row.cells[BITS].difference for row in board.rows}
    assert found["whole"] is not None
    assert found["short"] is not None
    assert (found["whole"].items, found["short"].items) == (60, 50)
    runs = {row.name: pq.read_table(row.runs[0].path / "items/caption-likelihood.parquet") for row in board.rows}
    ours, theirs = runs["short"], runs["base"].slice(10)
    metric = [sum(t["bits"].to_pylist()) / sum(t["bytes"].to_pylist()) for t in (ours, theirs)]
    assert found["short"].mean == pytest.approx(metric[0] - metric[1])


def row(path: Path, name: str, hashes: dict[str, str], *seeds: int) -> Row:
    return Row(name, tuple(Run(path=path, manifest={"name": name, "seed": s, "hashes": hashes}) for s in seeds))


def test_why_rows_may_not_be_compared(tmp_path: Path) -> None:
    same = {"data": "d", "evaluation": "e", "budget": "b", "order": "o"}
    base = row(tmp_path, "base", same, 0, 1)
    assert comparable(row(tmp_path, "a", same, 1, 2), base) == ()
    for kind in ("data", "evaluation", "budget"):
        other = row(tmp_path, "a", {**same, kind: "x"}, 0)
        assert comparable(other, base) == (f"other {kind} (x, not {same[kind]})",)
        assert comparable(base, other) == (f"other {kind} ({same[kind]}, not x)",)
        without = row(tmp_path, "a", {k: v for k, v in same.items() if k != kind}, 0)
        assert comparable(without, base) == (f"no {kind} hash recorded",)
        assert comparable(base, without) == (f"no {kind} hash recorded in a",)
    assert comparable(row(tmp_path, "a", same, 5), base) == ("other seeds (5, not 0, 1)",)
    assert comparable(row(tmp_path, "a", {**same, "order": "x"}, 0), base) == ("other sample order at the same seed",)
    unordered = row(tmp_path, "a", {k: v for k, v in same.items() if k != "order"}, 0)
    assert comparable(unordered, base) == ("no order hash recorded",)
    assert comparable(base, unordered) == ("no order hash recorded in a",)


def test_rows_that_fit_the_reference_but_not_a_baseline(make_run: Callable[..., Path], tmp_path: Path) -> None:
    """Differences go to the control; a row that shares a seed with the reference alone is left out, and it is said."""
    make_run("all", 0)
    make_run("all", 1)
    make_run("other", 1)
    make_run("blank", 0, control=True, quality=0.1)
    board = build_leaderboard(find_runs([tmp_path]))
    rows = {row.name: row for row in board.rows}
    assert all(row.comparable for row in board.rows)
    assert rows["all"].cells[BITS].difference is not None
    assert rows["other"].cells[BITS].difference is None
    assert "other is not compared with blank on caption-likelihood: other seeds (1, not 0)" in board.warnings


def test_draws_follow_from_the_task_alone(make_run: Callable[..., Path], tmp_path: Path) -> None:
    """Another row in the table changes no interval, only what is corrected together."""
    for seed in (0, 1):
        make_run("base", seed, quality=0.3)
        make_run("one", seed, quality=0.5)
    first = build_leaderboard(find_runs([tmp_path]), "base").rows[1].cells[BITS].difference
    make_run("two", 0, quality=0.4)
    make_run("two", 1, quality=0.4)
    board = build_leaderboard(find_runs([tmp_path]), "base")
    second = next(r for r in board.rows if r.name == "one").cells[BITS].difference
    assert first is not None
    assert second is not None
    assert (first.mean, first.low, first.high, first.p) == pytest.approx(
        (second.mean, second.low, second.high, second.p)
    )
    assert (first.family, second.family) == (1, 2)
    assert second.detectable > first.detectable
