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
class Items:
    """What was measured: ``ids`` [items], sorted, each once, and ``clusters`` [items], the image each belongs to."""

    ids: NDArray[Any]
    clusters: NDArray[Any]

    @cached_property
    def signature(self) -> bytes:
        """Equal for the same items in the same clusters."""
        digest = hashlib.sha256()
        for names in (self.ids, self.clusters):
            digest.update(str(names.dtype).encode())
            digest.update(np.ascontiguousarray(names).tobytes())
        return digest.digest()

    @cached_property
    def groups(self) -> tuple[int, NDArray[np.intp]]:
        """How many clusters there are, and [items], the number of each item's."""
        names, group = np.unique(self.clusters, return_inverse=True)
        return len(names), group


@dataclass(frozen=True, eq=False)
class ItemScores:
    """One metric of one run, item by item: the metric is the ratio of the sums of its two columns, [items] each."""

    items: Items
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
        return cls(Items(ids, ids if clusters is None else np.asarray(clusters, dtype=np.str_)[first]), above, below)

    def only(self, items: Items) -> ItemScores:
        """Keep these items; all of them must be here."""
        at = np.searchsorted(self.items.ids, items.ids)
        return ItemScores(items, self.numerators[at], self.denominators[at])


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
        items = runs[0].items
        if any(run.items.signature != items.signature for run in runs):
            shared = items.ids
            for run in runs[1:]:
                shared = np.intersect1d(shared, run.items.ids, assume_unique=True)
            items = Items(shared, items.clusters[np.searchsorted(items.ids, shared)])
            runs = [run.only(items) for run in runs]
        count, group = items.groups
        above = np.stack([np.bincount(group, run.numerators, count) for run in runs], 1)
        below = np.stack([np.bincount(group, run.denominators, count) for run in runs], 1)
        counting = (below != 0).any(1)
        used = np.zeros(len(group), dtype=bool)
        for run in runs:
            used |= run.denominators != 0
        return cls(above[counting], below[counting], int(used.sum()), key)

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
        places: dict[bytes, int] = {}  # often all runs have the same denominators: their draws are computed once
        back = [places.setdefault(below.tobytes(), len(places)) for below in self.denominators.T]
        distinct = self.denominators[:, [back.index(n) for n in range(len(places))]]
        return ratio(counts @ self.numerators, (counts @ distinct)[:, back])


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
    drawn = generator(key).integers(clusters, size=(DRAWS, clusters))
    drawn += clusters * np.arange(DRAWS)[:, None]  # counting all draws at once is ten times as fast as a multinomial
    return np.bincount(drawn.reshape(-1), minlength=DRAWS * clusters).reshape(DRAWS, clusters).astype(np.float64)


class ScoreFiles:
    """The tables of items that runs wrote, each read once, and only the columns that are asked for."""

    def __init__(self) -> None:
        self._files: dict[Path, tuple[Any, Items, NDArray[np.intp]] | None] = {}
        self._items: dict[bytes, Items] = {}

    def scores(self, run: Path, task: str, info: MetricInfo) -> ItemScores | None:
        """Return a metric of the run in the folder ``run``; ``None`` without readable scores that it follows from.

        Items without a value in either column are left out.
        """
        path = run / "items" / f"{Path(task).name}.parquet"
        if path not in self._files:
            self._files[path] = self._read(path)
        if (file := self._files[path]) is None or not info.numerator:
            return None
        table, items, order = file
        columns = [table[c] for c in (info.numerator, info.denominator) if c in table.column_names]
        if len(columns) < 1 + bool(info.denominator):
            return None
        values = [np.asarray(column.to_numpy(), dtype=np.float64)[order] for column in columns]
        if any(column.null_count for column in columns):
            valid = np.logical_and.reduce([column.is_valid().to_numpy() for column in columns])[order]
            items = Items(items.ids[valid], items.clusters[valid])
            values = [value[valid] for value in values]
        return ItemScores(items, values[0], values[1] if info.denominator else np.ones(len(values[0])))

    def _read(self, path: Path) -> tuple[Any, Items, NDArray[np.intp]] | None:
        """Return a file's table, its items and their places in it; ``None`` where there is none that can be read."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        if not path.is_file():
            return None
        try:
            table = pq.ParquetFile(path).read(use_threads=False)  # of a thousand rows threads cost more than they save
        except (OSError, pa.ArrowException):
            return None
        if "item" not in table.column_names:
            return None
        ids, order = np.unique(np.asarray(table["item"].to_pylist(), dtype=np.str_), return_index=True)
        has = "cluster" in table.column_names
        clusters = np.asarray(table["cluster"].to_pylist(), dtype=np.str_)[order] if has else ids
        items = Items(ids, clusters)
        return table, self._items.setdefault(items.signature, items), order
