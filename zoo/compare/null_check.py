"""Does the level hold? Comparisons simulated on the per-item scores of real runs, where the true difference is known.

A simulated run of a recipe takes each cluster of items from one of the recipe's stored runs, chosen at random, and adds
an effect of its seed to the metric. So the items are as hard, and the seeds disagree on them as much, as they really
do. Then the items themselves are redrawn. A recipe against itself has no true difference; a shift may be planted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from zoo.compare.item_scores import ItemScores, ScoreTable, generator
from zoo.compare.statistics import LEVEL, differences, estimate

TOGETHER = 32
"""Comparisons simulated at once: their clusters are redrawn by one matrix product."""


@dataclass(frozen=True, kw_only=True)
class SeedSpread:
    """How far a recipe's metric differs between its seeds on the same items; standard deviations.

    Attributes:
        total: as measured.
        items: what would be there if a seed only moved single items, independently: shrinks with more items.
        own: the rest, which more items do not remove; 0 where the first two leave none.
    """

    total: float
    items: float
    own: float


def seed_spread(runs: Sequence[ItemScores]) -> SeedSpread:
    """Split the spread over seeds; needs two runs or more."""
    table = ScoreTable.of(runs)
    of_cluster = table.influence.mean(1, keepdims=True)
    rest = float(((table.influence - of_cluster) ** 2).sum()) / ((len(runs) - 1) * (table.clusters - 1))
    total, items = float(table.metrics.var(ddof=1)), rest / table.clusters
    return SeedSpread(total=math.sqrt(total), items=math.sqrt(items), own=math.sqrt(max(0.0, total - items)))


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """What to simulate.

    Attributes:
        seeds: of each row; both have the same.
        seed_sd: standard deviation of the effect of a seed on the metric, in the metric's unit.
        shared: share of its variance that all rows have in common at the same seed (same order of samples).
        rows: how many rows are compared with one baseline.
        clusters: of a simulated test set; 0 = as many as were stored.
        shift: added to the metric of every row but the baseline.
        key: seeds everything.
    """

    seeds: int
    seed_sd: float
    shared: float = 0.0
    rows: int = 1
    clusters: int = 0
    shift: float = 0.0
    key: str = "null"

    def comparisons(
        self, ours: Sequence[ItemScores], theirs: Sequence[ItemScores], repeats: int
    ) -> Iterator[tuple[ScoreTable, range, tuple[range, ...], float]]:
        """Yield simulated comparisons.

        Args:
            ours: stored runs of the recipe that all rows have; theirs: of the baseline, the same for a null check.

        Yields:
            A table of runs, which of them are the baseline's, which are each row's, and the true difference.
        """
        stored = ScoreTable.of([*theirs, *ours])
        count = np.array([len(theirs), len(ours)])
        first = np.array([0, len(theirs)])
        pooled = [
            stored.numerators[:, f : f + n].sum() / stored.denominators[:, f : f + n].sum()
            for f, n in zip(first, count, strict=True)
        ]
        truth = float(pooled[1] - pooled[0] + self.shift)
        recipe = np.repeat([0] + [1] * self.rows, self.seeds)  # [runs], which recipe a simulated run is of
        runs = len(recipe)
        random = generator(self.key)
        drawn = self.clusters or stored.clusters
        for start in range(0, repeats, TOGETHER):
            above, below = [], []
            for _ in range(min(TOGETHER, repeats - start)):
                cluster = random.integers(stored.clusters, size=(drawn, 1))
                run = first[recipe] + np.floor(random.random((drawn, runs)) * count[recipe]).astype(np.int64)
                effect = math.sqrt(1 - self.shared) * random.normal(size=(self.rows + 1, self.seeds))
                effect += math.sqrt(self.shared) * random.normal(size=self.seeds)
                shift = self.seed_sd * effect.reshape(-1) + self.shift * recipe  # [runs]
                below.append(stored.denominators[cluster, run])
                above.append(stored.numerators[cluster, run] + shift * below[-1])  # moves the ratio by just as much
            table = ScoreTable(np.concatenate(above, 1), np.concatenate(below, 1), drawn, self.key)
            for at in range(0, runs * len(above), runs):
                baseline, *rows = (range(s, s + self.seeds) for s in range(at, at + runs, self.seeds))
                yield table, baseline, tuple(rows), truth


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of simulated comparisons; shares of all repeats.

    Attributes:
        found: any row's adjusted p was below the level: of a null check, the familywise error rate.
        single: the first row's own p was below the level.
        covered: the first row's interval held the true difference.
        width: mean half width of that interval.
        detectable: root of the mean squared minimum detectable difference.
    """

    repeats: int
    found: float
    single: float
    covered: float
    width: float
    detectable: float

    @property
    def margin(self) -> float:
        """Two standard errors of a share that is truly ``LEVEL``."""
        return 2 * math.sqrt(LEVEL * (1 - LEVEL) / self.repeats)


def simulate(ours: Sequence[ItemScores], theirs: Sequence[ItemScores], simulation: Simulation, repeats: int) -> Outcome:
    """Make simulated comparisons as a leaderboard makes them, and count what they find.

    Exploratory rows (one seed) are counted by their p value, though a leaderboard never calls them clear.
    """
    found = single = covered = 0
    widths, detectable = [], []
    for table, baseline, rows, truth in simulation.comparisons(ours, theirs, repeats):
        estimates = {row: e for row, at in enumerate(rows) if (e := estimate(table, at, baseline)) is not None}
        results = differences(estimates)
        found += any(d.p_adjusted < LEVEL for d in results.values())
        if (first := results.get(0)) is not None:
            single += first.p < LEVEL
            covered += first.low <= truth <= first.high
            widths.append((first.high - first.low) / 2)
            detectable.append(first.detectable)
    return Outcome(
        repeats=repeats,
        found=found / repeats,
        single=single / repeats,
        covered=covered / repeats,
        width=float(np.mean(widths)) if widths else math.nan,
        detectable=float(np.sqrt(np.mean(np.square(detectable)))) if detectable else math.nan,
    )
