"""Intervals of differences between two models on the same items.

First cut: a percentile bootstrap, paired by item, over clusters of items; runs of several seeds are averaged per item
first. The interval therefore tells how the difference would vary with other *items*, not with other training seeds.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

DRAWS = 2000
LEVEL = 0.95

Scores = Mapping[str, tuple[float, float]]
"""Item -> (numerator, denominator); the metric is the ratio of their sums."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Metric of one row less that of the baseline, with its interval.

    Attributes:
        mean: the difference on the items both have.
        low, high: ends of the interval.
        items: how many items both have; clusters: how many groups were resampled.
        seeds: how many training seeds both rows have; with one, the interval is over items only.
        p: two-sided p value of no difference, from the same distribution as the interval.
        p_adjusted: after Holm's correction over the ``family`` rows of the same column.
        family: how many differences were corrected together.
        detectable: the smallest difference that would be found clear with a power of 80 %; NaN where not known.
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
        return not self.exploratory and self.p_adjusted < 1 - LEVEL


def pool_seeds(runs: Sequence[Scores]) -> dict[str, tuple[float, float]]:
    """Average each item's scores over runs, keeping the items that all runs have."""
    shared = set(runs[0]).intersection(*runs[1:]) if runs else set()
    return {
        item: (sum(run[item][0] for run in runs) / len(runs), sum(run[item][1] for run in runs) / len(runs))
        for item in sorted(shared)
    }


def paired_difference(
    ours: Scores, theirs: Scores, clusters: Mapping[str, str], key: str = "", draws: int = DRAWS
) -> Difference | None:
    """Bootstrap the difference of two ratios of sums over the items that both have.

    Clusters are drawn with replacement, as many as there are, and every member comes along; both models see the same
    draw.

    Args:
        clusters: item -> cluster; an item without one is its own.
        key: seeds the generator together with nothing else, so that a report can be repeated.

    Returns:
        The difference, or ``None`` with fewer than two clusters in common.
    """
    shared = [item for item in ours if item in theirs]
    names = {c: n for n, c in enumerate(dict.fromkeys(clusters.get(item, item) for item in shared))}
    if len(names) < 2:
        return None
    group = np.array([names[clusters.get(item, item)] for item in shared])
    columns = np.array([(*ours[i], *theirs[i]) for i in shared], dtype=np.float64)  # [items, 4]
    sums = np.zeros((len(names), 4))
    np.add.at(sums, group, columns)  # [clusters, 4]
    rng = np.random.default_rng(zlib.crc32(key.encode()))
    uniform = np.full(len(names), 1 / len(names))
    counts = rng.multinomial(len(names), uniform, size=draws)  # [draws, clusters]
    resampled = _difference(counts @ sums)
    resampled = resampled[np.isfinite(resampled)]
    mean = float(_difference(sums.sum(0, keepdims=True))[0])
    if not len(resampled) or not np.isfinite(mean):
        return None
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail])
    below = (1 + (resampled <= 0).sum()) / (1 + len(resampled))
    above = (1 + (resampled >= 0).sum()) / (1 + len(resampled))
    p = min(1.0, 2 * float(min(below, above)))
    return Difference(
        mean=mean, low=float(low), high=float(high), items=len(shared), clusters=len(names), p=p, p_adjusted=p
    )


def _difference(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return ours - theirs for rows of (numerator, denominator, numerator, denominator)."""
    with np.errstate(divide="ignore", invalid="ignore"):
        difference: NDArray[np.float64] = sums[:, 0] / sums[:, 1] - sums[:, 2] / sums[:, 3]
    return difference
