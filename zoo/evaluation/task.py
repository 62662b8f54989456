"""What a task is: it needs capabilities, runs on a split, and returns metrics with the per-item scores behind them."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from zoo.capabilities import capability_name
from zoo.data.sample import BadSample, BadSamples
from zoo.errors import ConfigError, DataError
from zoo.evaluation.catalogue import MetricInfo

if TYPE_CHECKING:
    from PIL.Image import Image

Progress = Callable[[str, int, int], None]
"""Called as ``progress(task name, items done, items in all)``."""

COSINE_TIE = 1e-6
"""Cosine similarities closer than this are equal: fp32 dot products of the same vectors differ by about 1e-7."""
NATS_TIE = 1e-4
"""Log-likelihoods closer than this are equal: fp32 sums over a short text differ by about 1e-5 with the batch's
shape."""

SAMPLES = 12
"""How many items a report shows."""


class SampleLike(Protocol):
    """The part of `zoo.data.sample.Sample` that evaluation reads."""

    @property
    def id(self) -> str: ...
    @property
    def image(self) -> Image | None: ...
    @property
    def texts(self) -> tuple[str, ...]: ...
    @property
    def meta(self) -> Mapping[str, Any]: ...


class SourceLike(Protocol):
    """The part of a data source that evaluation reads."""

    @property
    def name(self) -> str: ...
    @property
    def version(self) -> str: ...
    def ids(self, split: str) -> Sequence[str]: ...
    def sample(self, id: str, /) -> SampleLike: ...


class TaskConfig(Protocol):
    """What the registry holds for a task: plain fields, ``build``, and the meaning of its metrics."""

    metrics: ClassVar[Mapping[str, MetricInfo]]

    def build(self) -> Task: ...


@dataclass(kw_only=True)
class TaskResult:
    """Outcome of one task.

    Attributes:
        name: the task.
        metrics: metric name -> value; shares are in 0..1.
        items: one row an item: ``item``, ``cluster`` (what is resampled together; the item unless the sample's meta
            has a ``cluster``) and the score columns that `MetricInfo` names.
        spec_hash: hash of everything that decides the numbers except the model: see `Task.spec`.
        samples: up to `SAMPLES` of ``{"id", "output", ...}`` to look at.
    """

    name: str
    metrics: dict[str, float]
    items: list[dict[str, Any]]
    spec_hash: str
    samples: list[dict[str, Any]] = field(default_factory=list)


class Task(ABC):
    """One evaluation. ``version`` is raised whenever a change makes new numbers incomparable with old ones."""

    name: ClassVar[str]
    version: ClassVar[int] = 1
    needs: ClassVar[tuple[type, ...]] = ()

    def __init__(self, config: Any) -> None:
        self.config = config

    def missing(self, model: Any) -> tuple[str, ...]:
        """Return the capabilities that the task needs and ``model`` does not offer; empty if it can run."""
        return tuple(capability_name(need) for need in self.needs if not isinstance(model, need))

    def spec(self, source: SourceLike, split: str) -> dict[str, Any]:
        """Return what is hashed: task and version, its fields (prompt, decoding, batch, items), data and split."""
        return {
            "task": self.name,
            "version": self.version,
            "config": asdict(self.config),
            "source": [source.name, str(source.version)],
            "split": split,
        }

    def spec_hash(self, source: SourceLike, split: str) -> str:
        return digest(self.spec(source, split))

    @abstractmethod
    def run(self, model: Any, source: SourceLike, split: str, progress: Progress | None = None) -> TaskResult:
        """Evaluate ``model`` on ``split``.

        Raises:
            DataError: the split is empty or an item lacks what the task needs.
        """


def task_metrics(task: str) -> Mapping[str, MetricInfo]:
    """Return the metrics of a registered task by name; empty for an unknown one (a report of a foreign run)."""
    from zoo.plugin import catalogue

    try:
        config = catalogue()["task"].config_class(task)
    except ConfigError:
        return {}
    metrics: Mapping[str, MetricInfo] = getattr(config, "metrics", {})
    return metrics


def digest(value: Any) -> str:
    """Return 16 hex digits of the SHA-256 of ``value`` as canonical JSON."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def by_hash(ids: Sequence[str]) -> list[str]:
    """Order ids by the SHA-256 of their text: a fixed shuffle that does not depend on the split's size or order."""
    return sorted(ids, key=lambda i: hashlib.sha256(i.encode()).digest())


def choose_ids(source: SourceLike, split: str, items: int) -> list[str]:
    """Return the split's ids in its order, thinned to the first ``items`` of `by_hash` (0 keeps all).

    Raises:
        DataError: the split is empty.
    """
    ids = list(source.ids(split))
    if not ids:
        raise DataError(f"the {split} split of {source.name} is empty: nothing to evaluate; choose another split")
    if not items or items >= len(ids):
        return ids
    kept = set(by_hash(ids)[:items])
    return [i for i in ids if i in kept]


def sample_ids(ids: Sequence[str], count: int = SAMPLES) -> list[str]:
    """Return the ids that a report shows: the same for every model and task on a split."""
    return by_hash(ids)[:count]


def batches(
    task: str, source: SourceLike, ids: Sequence[str], size: int, progress: Progress | None
) -> Iterator[list[SampleLike]]:
    """Read samples ``size`` at a time, reporting progress after each batch was used.

    What cannot be read is skipped and logged, up to the source's ``max_bad``.

    Raises:
        DataError: an item has no image or no text, or too many cannot be read.
    """
    bad = BadSamples(source.name, getattr(source, "max_bad", 0))
    if progress:
        progress(task, 0, len(ids))
    for start in range(0, len(ids), size):
        samples: list[SampleLike] = []
        for i in ids[start : start + size]:
            try:
                samples.append(source.sample(i))
            except BadSample as error:
                bad.add(error.id, error.reason)
        for sample in samples:
            if sample.image is None or not sample.texts or not all(sample.texts):
                lacking = "image" if sample.image is None else "text"
                raise DataError(
                    f"{task}: item {sample.id} of {source.name} has no {lacking}; leave it out of the split"
                )
        if samples:
            yield samples
        if progress:
            progress(task, min(start + size, len(ids)), len(ids))


def text_samples(source: SourceLike, ids: Sequence[str]) -> Iterator[SampleLike]:
    """Read samples for their texts and meta data, without their images where the source can.

    What cannot be read is skipped and logged, up to the source's ``max_bad``.

    Raises:
        DataError: too many cannot be read.
    """
    read: Callable[[str], SampleLike] = getattr(source, "text_sample", None) or source.sample
    bad = BadSamples(source.name, getattr(source, "max_bad", 0))
    for i in ids:
        try:
            yield read(i)
        except BadSample as error:
            bad.add(error.id, error.reason)


def cluster_of(sample: SampleLike) -> str:
    """Return what is resampled together with this item: its ``cluster`` in the meta data, else itself."""
    return str(sample.meta.get("cluster", sample.id))


def thumbnail(image: Image, side: int = 96) -> str:
    """Return the image as base64 PNG, at most ``side`` pixels a side, transparency on white."""
    from PIL import Image as pil

    small = image.convert("RGBA")
    small.thumbnail((side, side))
    canvas = pil.new("RGBA", small.size, "white")
    canvas.alpha_composite(small)
    buffer = io.BytesIO()
    canvas.convert("RGB").save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode("ascii")
