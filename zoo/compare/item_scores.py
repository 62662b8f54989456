"""Per-item scores of runs, read once, and brought onto the items that several runs have in common."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zoo.evaluation.catalogue import MetricInfo

Floats = NDArray[np.float64]

DRAWS = 2000
"""How often clusters are redrawn."""


@dataclass(frozen=True, eq=False)
class ItemScores:
    """One metric of one run, item by item: the metric is the ratio of the sums.

    Attributes:
        items: [items], ids, sorted, each once.
        clusters: [items], what each belongs to (its image).
        numerators, denominators: [items].
    """

    items: NDArray[Any]
    clusters: NDArray[Any]
    numerators: Floats
    denominators: Floats

    @classmethod
    def of(
        cls,
        items: Sequence[str] | NDArray[Any],
        numerators: Sequence[float] | Floats,
        denominators: Sequence[float] | Floats | None = None,
        clusters: Sequence[str] | NDArray[Any] | None = None,
    ) -> ItemScores:
        """Sort by item; without denominators each item counts one, without clusters each is its own."""
        ids, first = np.unique(np.asarray(items, dtype=np.str_), return_index=True)
        above = np.asarray(numerators, dtype=np.float64)[first]
        below = np.ones(len(ids)) if denominators is None else np.asarray(denominators, dtype=np.float64)[first]
        return cls(ids, ids if clusters is None else np.asarray(clusters, dtype=np.str_)[first], above, below)

    @cached_property
    def signature(self) -> bytes:
        """Equal for runs with the same items in the same clusters."""
        digest = hashlib.sha256()
        for names in (self.items, self.clusters):
            digest.update(str(names.dtype).encode())
            digest.update(np.ascontiguousarray(names).tobytes())
        return digest.digest()

    def only(self, items: NDArray[Any]) -> ItemScores:
        """Keep these items; all of them must be here, sorted."""
        at = np.searchsorted(self.items, items)
        return ItemScores(items, self.clusters[at], self.numerators[at], self.denominators[at])


@dataclass(frozen=True, eq=False)
class ScoreTable:
    """One metric of several runs on the same items, summed over clusters: all that resampling needs.

    Attributes:
        numerators, denominators: [clusters, runs].
        items: how many items count: those with a denominator in any run.
        key: seeds the draws of clusters together with nothing else, so that a report can be repeated.
    """

    numerators: Floats
    denominators: Floats
    items: int
    key: str = ""

    @classmethod
    def of(cls, runs: Sequence[ItemScores], key: str = "") -> ScoreTable:
        """Bring runs onto the items that all have; clusters are those of the first run.

        Clusters in which no run has a denominator (questions of another kind) are left out.
        """
        if any(run.signature != runs[0].signature for run in runs):
            shared = runs[0].items
            for run in runs[1:]:
                shared = np.intersect1d(shared, run.items, assume_unique=True)
            runs = [run.only(shared) for run in runs]
        names, group = np.unique(runs[0].clusters, return_inverse=True)
        above = np.stack([np.bincount(group, run.numerators, len(names)) for run in runs], 1)
        below = np.stack([np.bincount(group, run.denominators, len(names)) for run in runs], 1)
        counting = (below != 0).any(1)
        items = np.zeros(len(group), dtype=bool)
        for run in runs:
            items |= run.denominators != 0
        return cls(above[counting], below[counting], int(items.sum()), key)

    @property
    def clusters(self) -> int:
        return len(self.numerators)

    @cached_property
    def metrics(self) -> Floats:
        """[runs], the metric of each run."""
        return ratio(self.numerators.sum(0), self.denominators.sum(0))

    @cached_property
    def influence(self) -> Floats:
        """[clusters, runs], how far each cluster moves its run's metric, times the number of clusters; sums to 0.

        The linearisation of a ratio of means: (numerator - metric * denominator) / mean denominator.
        """
        return ratio(self.numerators - self.metrics * self.denominators, self.denominators.mean(0))

    @cached_property
    def redrawn(self) -> Floats:
        """[DRAWS, runs], the metrics of all runs where clusters are drawn with replacement, as many as there are."""
        counts = _counts(self.clusters, self.key)
        distinct, back = np.unique(self.denominators, axis=1, return_inverse=True)  # often equal for all runs
        return ratio(counts @ self.numerators, (counts @ distinct)[:, back.reshape(-1)])


def ratio(above: Floats, below: Floats) -> Floats:
    """Divide; what is divided by nought is no finite number, without a warning."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(above / below, dtype=np.float64)


def generator(key: str) -> np.random.Generator:
    """Return random numbers that follow from ``key`` alone."""
    return np.random.default_rng(zlib.crc32(key.encode()))


@lru_cache(maxsize=4)
def _counts(clusters: int, key: str) -> Floats:
    """[DRAWS, clusters], how often each cluster is drawn."""
    drawn = generator(key).multinomial(clusters, np.full(clusters, 1 / clusters), size=DRAWS)
    return drawn.astype(np.float64)


class ScoreFiles:
    """The tables of items that runs wrote, each read once, and only the columns that are asked for."""

    def __init__(self) -> None:
        self._tables: dict[Path, Any] = {}
        self._names: dict[Path, tuple[NDArray[Any], NDArray[Any]]] = {}

    def scores(self, run: Path, task: str, info: MetricInfo) -> ItemScores | None:
        """Return a metric of the run in the folder ``run``; ``None`` without readable scores that it follows from.

        Items without a value in either column are left out.
        """
        path = run / "items" / f"{Path(task).name}.parquet"
        if path not in self._tables:
            self._tables[path] = _read(path)
        table = self._tables[path]
        columns = [c for c in (info.numerator, info.denominator) if c]
        if table is None or not info.numerator or any(c not in table.column_names for c in columns):
            return None
        if path not in self._names:
            items = np.asarray(table["item"].to_pylist(), dtype=np.str_)
            has = "cluster" in table.column_names
            self._names[path] = items, np.asarray(table["cluster"].to_pylist(), dtype=np.str_) if has else items
        items, clusters = self._names[path]
        valid = np.logical_and.reduce([table[c].is_valid().to_numpy() for c in columns])
        values = [np.asarray(table[c].to_numpy(), dtype=np.float64)[valid] for c in columns]
        return ItemScores.of(items[valid], values[0], values[1] if info.denominator else None, clusters[valid])


def _read(path: Path) -> Any:
    """Return the file as a table of Arrow, ``None`` when it is absent, unreadable or has no items."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.is_file():
        return None
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException):
        return None
    return table if "item" in table.column_names else None
