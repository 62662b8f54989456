"""Differences between recipes: intervals, p values, what could have been found. docs/statistics.md says why this way.

A metric is a ratio of sums over items, measured on runs of several training seeds. Items and seeds are both samples, so
a draw of the bootstrap has two levels:

- *items*: clusters of items are drawn with replacement, jointly for all runs, so that everything is paired by item;
- *seeds*: runs of the same seed are a pair. Two or three of them cannot be resampled (three have ten resamples, all too
  narrow); instead the variance of their differences is drawn from what a chi-square of so few degrees of freedom says.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist
from typing import TypeVar

import numpy as np

from zoo.compare.item_scores import DRAWS, Floats, ItemScores, ScoreTable, generator

LEVEL = 0.05
POWER = 0.8
SEED_DRAWS = 8
"""Draws of the seeds' part for every draw of clusters."""

Name = TypeVar("Name")


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Metric of one row less that of the baseline, with its interval.

    Attributes:
        mean: the difference on the items and seeds that both have.
        low, high: ends of the 95 % interval, not widened for the other rows.
        items: how many items count in the metric; clusters: how many groups of them were resampled.
        seeds: how many training seeds both rows have; with one, everything here is over items only.
        p: two-sided p value of no difference: below ``LEVEL`` where the interval excludes nought.
        p_adjusted: after Holm's correction over the ``family`` rows of the same column.
        family: how many differences were corrected together.
        detectable: the smallest difference that would be found with a power of 80 % at the strictest level of the
            family (``LEVEL / family``), were the variances as estimated; NaN where not known.
        baseline: name of the row it was taken against.
    """

    mean: float
    low: float
    high: float
    items: int
    clusters: int
    seeds: int = 1
    p: float = 1.0
    p_adjusted: float = 1.0
    family: int = 1
    detectable: float = math.nan
    baseline: str = ""

    @property
    def exploratory(self) -> bool:
        """Whether only one seed stands behind either row: what other seeds would give is then not in the interval."""
        return self.seeds < 2

    @property
    def clear(self) -> bool:
        """Whether two or more seeds tell the rows apart, after correction; one seed never does."""
        return not self.exploratory and self.p_adjusted < LEVEL


@dataclass(frozen=True, eq=False)
class Estimate:
    """A difference before it is held beside the others of its column.

    Attributes:
        mean: the difference.
        errors: [draws], sorted: what a repetition with other items and seeds might be off by.
        items, clusters, seeds: what it rests on.
    """

    mean: float
    errors: Floats
    items: int
    clusters: int
    seeds: int

    def interval(self, level: float = LEVEL) -> tuple[float, float]:
        """Return the ends of the interval that leaves out ``level``, half on either side."""
        last = len(self.errors) - 1
        low, high = self.errors[math.floor(level / 2 * last)], self.errors[math.ceil((1 - level / 2) * last)]
        return self.mean + float(low), self.mean + float(high)

    @property
    def p(self) -> float:
        """Two-sided p value of no difference; the draw at hand counts as one, so it is never nought."""
        below = np.searchsorted(self.errors, -self.mean, side="right")  # draws at or below no difference
        above = len(self.errors) - np.searchsorted(self.errors, -self.mean, side="left")
        return min(1.0, 2 * (1 + int(min(below, above))) / (1 + len(self.errors)))

    def detectable(self, level: float = LEVEL) -> float:
        """Return the true difference that is found at ``level`` with a chance of ``POWER``, variances being these."""
        low, high = self.interval(level)
        return (high - low) / 2 + float(self.errors[round(POWER * (len(self.errors) - 1))])


def estimate(table: ScoreTable, ours: Sequence[int], theirs: Sequence[int]) -> Estimate | None:
    """Estimate the difference of two rows: the mean over seeds of the difference of their metrics.

    With S seeds and C clusters, the error of the mean difference is the sum of

    1. deviations of the mean difference where clusters are redrawn, C of C, times sqrt(C / (C - 1)) and
       sqrt((C - 1) / chi2(C - 1)) (what makes a percentile interval of few clusters as wide as Student's), times
       sqrt(1 - M_rest / M_clusters). M are the mean squares of a two-way analysis of variance of the clusters'
       influences: what each seed does to each item (M_rest) is redrawn with the seeds already.
    2. a normal of variance (S - 1) V / chi2(S - 1), V the variance of the S differences over S, but of no less than
       M_rest / (S C), which S differences would have were there no effect of the seed beyond single items: differences
       that agree by chance shall not pass for certainty. Not with one seed.

    Args:
        table: the metric of the runs.
        ours, theirs: places of runs in the table; those at the same place have the same seed.

    Returns:
        The estimate, or ``None`` with fewer than two clusters or where a metric is not finite.
    """
    clusters, seeds = table.clusters, len(ours)
    if clusters < 2 or not seeds:
        return None
    one, other = np.asarray(ours), np.asarray(theirs)
    by_seed = table.metrics[one] - table.metrics[other]  # [seeds]
    mean = float(by_seed.mean())
    if not math.isfinite(mean):
        return None
    of_items = (table.redrawn[:, one] - table.redrawn[:, other]).mean(1) - mean  # [DRAWS]
    of_items = of_items * math.sqrt(clusters / (clusters - 1)) * (1 / _chi_ratio(clusters - 1, DRAWS))
    of_items = of_items[np.isfinite(of_items)]
    if not len(of_items):
        return None
    if seeds == 1:
        return Estimate(mean, np.sort(of_items), table.items, clusters, seeds)
    influence = table.influence[:, one] - table.influence[:, other]  # [clusters, seeds]
    of_cluster = influence.mean(1)
    between = seeds * float(of_cluster.var(ddof=1))
    rest = float(((influence - of_cluster[:, None]) ** 2).sum()) / ((seeds - 1) * (clusters - 1))
    if between > 0:
        of_items = of_items * math.sqrt(max(0.0, 1 - rest / between))
    draws = len(of_items) * SEED_DRAWS
    scale = math.sqrt(by_seed.var(ddof=1) / seeds) / _chi_ratio(seeds - 1, draws)
    scale = np.maximum(scale, math.sqrt(rest / (seeds * clusters)))
    of_seeds = scale * _normal(draws)
    errors = np.repeat(of_items, SEED_DRAWS) + of_seeds
    return Estimate(mean, np.sort(errors), table.items, clusters, seeds)


def paired_estimates(pairs: Mapping[str, tuple[list[ItemScores], list[ItemScores]]], key: str) -> dict[str, Estimate]:
    """Estimate several differences at once: all runs with the same items share one table and its draws.

    Args:
        pairs: name -> (runs of a row, runs of the baseline), those at the same place of the same seed.
        key: seeds the draws.
    """
    alike: dict[bytes, list[ItemScores]] = {}
    single: dict[str, list[ItemScores]] = {}
    for name, (ours, theirs) in pairs.items():
        runs = [*ours, *theirs]
        same = {run.items.signature for run in runs}
        if len(same) == 1:
            alike.setdefault(same.pop(), []).extend(runs)
        else:
            single[name] = runs
    tables = {}
    for signature, members in alike.items():
        members = list({id(run): run for run in members}.values())
        tables[signature] = ScoreTable.of(members, key), {id(run): n for n, run in enumerate(members)}
    estimates = {}
    for name, (ours, theirs) in pairs.items():
        if name in single:
            table, place = ScoreTable.of(single[name], key), {id(run): n for n, run in enumerate(single[name])}
        else:
            table, place = tables[ours[0].items.signature]
        found = estimate(table, [place[id(run)] for run in ours], [place[id(run)] for run in theirs])
        if found is not None:
            estimates[name] = found
    return estimates


def differences(estimates: Mapping[Name, Estimate], baseline: str = "") -> dict[Name, Difference]:
    """Correct the p values of one column together, and say what could have been found.

    The family of Holm's correction is all rows of the column that were compared with the baseline; rows with a single
    seed are a family of their own, as their p values speak of other items only.
    """
    found: dict[Name, Difference] = {}
    for exploratory in (False, True):
        family = {name: e for name, e in estimates.items() if (e.seeds < 2) == exploratory}
        ps = {name: e.p for name, e in family.items()}
        for (name, e), adjusted in zip(family.items(), holm(list(ps.values())), strict=True):
            low, high = e.interval()
            found[name] = Difference(
                mean=e.mean,
                low=low,
                high=high,
                items=e.items,
                clusters=e.clusters,
                seeds=e.seeds,
                p=ps[name],
                p_adjusted=adjusted,
                family=len(family),
                detectable=e.detectable(LEVEL / len(family)),
                baseline=baseline,
            )
    return found


def holm(ps: Sequence[float]) -> list[float]:
    """Adjust p values so that the chance of any false one below the level is at most the level (Holm 1979)."""
    adjusted = [0.0] * len(ps)
    largest = 0.0
    for rank, at in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[at]))
        adjusted[at] = largest
    return adjusted


@lru_cache(maxsize=16)
def _chi_ratio(freedom: int, draws: int) -> Floats:
    """[draws], evenly spaced quantiles of sqrt(chi2 / freedom) in random order: less noisy than draws at random."""
    random = generator(f"chi {freedom}")
    drawn = np.sort(random.chisquare(freedom, size=16 * draws))[8::16]
    return random.permutation(np.sqrt(drawn / freedom))


@lru_cache(maxsize=4)
def _normal(draws: int) -> Floats:
    """[draws], evenly spaced quantiles of the standard normal distribution in random order."""
    quantile = NormalDist().inv_cdf
    return generator("normal").permutation([quantile((n + 0.5) / draws) for n in range(draws)])
