"""Compositional generalisation: the same task on combinations seen in training and on ones held out, and the gap."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any, ClassVar

from zoo.errors import ConfigError, DataError, near
from zoo.evaluation.catalogue import COMPARED, METRICS, MetricInfo
from zoo.evaluation.task import (
    Progress,
    SampleLike,
    SourceLike,
    Task,
    TaskConfig,
    TaskResult,
    choose_ids,
    cluster_of,
    text_samples,
)

VERSION = 1
"""Raised whenever a held-out item is paired with another seen one."""

Combination = tuple[tuple[str, str], ...]


@dataclass(frozen=True, kw_only=True)
class CompositionalConfig:
    """Fields of the task ``compositional``.

    Attributes:
        tasks: which tasks are asked, joined by ``+``: naming, retrieval, text-to-image. Those that a model cannot do
            are left out.
        fields: other fields of these tasks, task -> field -> value, as ``{naming: {candidates: 50}}``.
        factors: keys of the samples' meta data whose values make a combination, joined by ``+``.
        items: how many held-out items (chosen by hash of their id); 0 takes all.
        batch_size: of every task.
        evaluator: run directory or checkpoint folder of the model that judges what text-to-image draws.
    """

    tasks: str = "naming+retrieval"
    fields: dict[str, dict[str, Any]] = field(default_factory=dict)
    factors: str = "role+skin_tone+gender"
    items: int = 0
    batch_size: int = 64
    evaluator: str = ""
    metrics: ClassVar[Mapping[str, MetricInfo]] = METRICS["compositional"]

    def __post_init__(self) -> None:
        for name in self.names:
            if name not in COMPARED:
                raise ConfigError(
                    f"compositional.tasks = {self.tasks!r}: {name!r}{near(name, COMPARED)} is not one of"
                    f" {', '.join(COMPARED)}, joined by +"
                )
        if len(set(self.names)) < len(self.names):
            raise ConfigError(f"compositional.tasks = {self.tasks!r} names one twice")
        for name, given in self.fields.items():
            if name not in self.names:
                raise ConfigError(f"compositional.fields has {name!r}, which is not among tasks = {self.tasks!r}")
            if given.get("texts", "first") != "first":
                raise ConfigError(f"compositional.fields.{name}.texts: an item has one score here; leave it at first")
            for key in ("items", "batch_size", "evaluator"):
                if key in given:
                    raise ConfigError(f"compositional.fields.{name}.{key}: set compositional.{key} in its place")
        if len(self.keys) < 2:
            raise ConfigError(f"compositional.factors = {self.factors!r}: expected at least two, joined by +")
        if self.batch_size < 1 or self.items < 0:
            raise ConfigError("compositional: batch_size is at least 1, items at least 0")

    @property
    def names(self) -> list[str]:
        """The tasks that are asked."""
        return [part.strip() for part in self.tasks.split("+")]

    @property
    def keys(self) -> list[str]:
        """The factors."""
        return [part.strip() for part in self.factors.split("+") if part.strip()]

    def inner(self) -> list[Task]:
        """Build the tasks that are asked, on all items that they are given."""
        from zoo.plugin import catalogue

        out = []
        for name in self.names:
            given = {**self.fields.get(name, {}), "items": 0, "batch_size": self.batch_size}
            if name == "text-to-image":
                given["evaluator"] = self.evaluator
            config: TaskConfig = catalogue()["task"].parse(name, given, f"compositional.fields.{name}")
            out.append(config.build())
        return out

    def check(self) -> None:
        """Parse the fields of the tasks and let those that lean on files look for them."""
        for task in self.inner():
            check = getattr(task.config, "check", None)
            if callable(check):
                check()

    def build(self) -> Compositional:
        return Compositional(self)


class Pooled:
    """A source whose one split holds chosen samples of several splits, so that they are ranked among each other."""

    def __init__(self, source: SourceLike, ids: Sequence[str]) -> None:
        self.source, self._ids = source, list(ids)
        self.name, self.version = source.name, f"{source.version}/compositional{VERSION}"
        self.max_bad = getattr(source, "max_bad", 0)

    def ids(self, split: str) -> list[str]:
        """Return the pooled ids, whatever the split is called."""
        return list(self._ids)

    def sample(self, id: str, /) -> SampleLike:
        return self.source.sample(id)

    def text_sample(self, id: str, /) -> SampleLike:
        return next(iter(text_samples(self.source, [id])))


def combination(sample: SampleLike, keys: Sequence[str]) -> Combination:
    """The factors that a sample has, with their values; ``()`` with fewer than two, which make no combination."""
    found = tuple((key, str(sample.meta[key])) for key in keys if sample.meta.get(key) is not None)
    return found if len(found) > 1 else ()


def pair(held: Mapping[str, Combination], seen: Mapping[str, Combination]) -> dict[str, str]:
    """Pair held-out items with seen ones that are as like them as can be.

    An item is compositional if no seen item has its combination while each of its values is seen. Its partner shares
    as many of its values as any seen item does, the first factors counting first; of those that do, the one that is
    partner of the fewest so far, then the first by a hash of both ids.

    Args:
        held, seen: item -> combination, in a stable order.

    Returns:
        Held-out item -> seen item, of those that are compositional.
    """
    with_value: dict[tuple[str, str], set[str]] = {}
    for other, theirs in seen.items():
        for value in theirs:
            with_value.setdefault(value, set()).add(other)
    whole = set(seen.values())
    used: dict[str, int] = {}
    pairs: dict[str, str] = {}
    for item, own in held.items():
        if not own or own in whole or not all(value in with_value for value in own):
            continue
        differing = sorted(product((False, True), repeat=len(own)), key=lambda places: (sum(places), places))
        alike: set[str] = set()
        for places in differing:  # at the latest the values one by one
            shared = [with_value[value] for value, differs in zip(own, places, strict=True) if not differs]
            if alike := set.intersection(*shared):
                break
        least = min(used.get(other, 0) for other in alike)
        free = [other for other in alike if used.get(other, 0) == least]
        partner = min(free, key=lambda other: hashlib.sha256(f"compositional/{item}/{other}".encode()).digest())
        used[partner] = least + 1
        pairs[item] = partner
    return pairs


class Compositional(Task):
    """Tasks on held-out combinations of known values and, in the same run, on like combinations seen in training.

    Every held-out item is paired with a training item (`pair`); both are ranked in one pool, which is the gallery of
    retrieval and gives naming its candidates. Scores come per pair: ``*_heldout``, ``*_seen`` and ``*_gap``, seen less
    held out. What a model has learned by heart it does well on seen items, so that a gap is what it fails to
    recombine *and* what it remembers; held-out scores of several models on the same pairs can be compared as they are.

    Use ``data=openmoji split_scheme=compositional``. Any split will do in which some items are compositional.
    """

    name = "compositional"
    config: CompositionalConfig

    def missing(self, model: Any) -> tuple[str, ...]:
        lacking = {task.name: task.missing(model) for task in self.config.inner()}
        if all(lacking.values()):
            return (" or ".join(f"{', '.join(what)} ({name})" for name, what in lacking.items()),)
        return ()

    def spec(self, source: SourceLike, split: str) -> dict[str, Any]:
        spec = super().spec(source, split)
        del spec["config"]["fields"], spec["config"]["evaluator"]  # a judge counts by its weights, in the task's own
        return {**spec, "inner": [task.spec(source, split) for task in self.config.inner()], "pairs": VERSION}

    def run(self, model: Any, source: SourceLike, split: str, progress: Progress | None = None) -> TaskResult:
        pairs, clusters = self._pairs(source, split)
        pooled = Pooled(source, list(dict.fromkeys([*pairs, *pairs.values()])))
        rows: dict[str, dict[str, Any]] = {
            item: {"item": item, "cluster": clusters[item], "seen": other} for item, other in pairs.items()
        }
        for task in self.config.inner():
            if task.missing(model):
                continue
            result = task.run(model, pooled, split, progress)
            for metric in COMPARED[task.name]:
                scores = _by_item(result, METRICS[task.name][metric])
                key = f"{task.name.replace('-', '_')}_{metric}"
                for item, other in pairs.items() if scores else ():
                    held, seen = scores[item], scores[other]
                    rows[item] |= {f"{key}_heldout": held, f"{key}_seen": seen, f"{key}_gap": seen - held}
        items = list(rows.values())
        metrics = {
            key: sum(row[key] for row in items) / len(items) for key in items[0] if key in METRICS["compositional"]
        }
        metrics |= {"pairs": float(len(items)), "seen": float(len(set(pairs.values())))}
        return TaskResult(name=self.name, metrics=metrics, items=items, spec_hash=self.spec_hash(source, split))

    def _pairs(self, source: SourceLike, split: str) -> tuple[dict[str, str], dict[str, str]]:
        """Held-out item -> seen item, and its cluster.

        Raises:
            ConfigError: the split is the one that is trained on.
            DataError: no item of the split is compositional.
        """
        if split == "train":
            raise ConfigError(f"{self.name}: the train split holds nothing out; evaluate val or test")
        keys = self.config.keys
        seen = {s.id: combination(s, keys) for s in text_samples(source, source.ids("train"))}
        held, clusters = dict[str, Combination](), dict[str, str]()
        for sample in text_samples(source, choose_ids(source, split, self.config.items)):
            held[sample.id], clusters[sample.id] = combination(sample, keys), cluster_of(sample)
        pairs = pair(held, seen)
        if not pairs:
            raise DataError(
                f"{self.name}: no item of the {split} split of {source.name} has a combination of {', '.join(keys)}"
                " that is not in train while its values are; use data=openmoji data.split_scheme=compositional"
            )
        return pairs, clusters


def _by_item(result: TaskResult, info: MetricInfo) -> dict[str, float]:
    """Each item's own value of a metric; empty where the task did not measure it."""
    if not result.items or info.numerator not in result.items[0]:
        return {}
    return {
        row["item"]: row[info.numerator] / (row[info.denominator] if info.denominator else 1) for row in result.items
    }
