"""Accuracy over labels, of items of any modality."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from zoo.capabilities import ClassifySamples
from zoo.errors import ConfigError, DataError, near
from zoo.evaluation.metric_info import MetricInfo
from zoo.evaluation.task import Progress, SourceLike, Task, TaskResult, choose_ids, cluster_of, sample_ids, text_samples

if TYPE_CHECKING:
    from zoo.data.sample import Sample

METRICS: Mapping[str, MetricInfo] = {
    "accuracy": MetricInfo(
        label="accuracy", numerator="right", percent=True, primary=True, help="share of items whose label was named"
    ),
    "majority": MetricInfo(
        label="majority",
        higher_is_better=None,
        numerator="majority",
        percent=True,
        help="what always naming the most frequent label of the training items comes to",
    ),
    "gain": MetricInfo(
        label="over majority", numerator="gain", percent=True, help="accuracy less that of the majority baseline"
    ),
    "accuracy_by_class": MetricInfo(
        label="by class",
        numerator="weighted_right",
        denominator="weight",
        percent=True,
        detail=True,
        help="mean over the labels of the share of their items that was named",
    ),
    "log_loss": MetricInfo(
        label="log loss", higher_is_better=False, numerator="nats", detail=True, help="nats an item, at most 50"
    ),
    "items": MetricInfo(label="items", higher_is_better=None, detail=True, help="items that were classified"),
    "labels": MetricInfo(label="labels", higher_is_better=None, detail=True, help="labels the model chooses among"),
}


@dataclass(frozen=True, kw_only=True)
class ModalityClassificationConfig:
    """Fields of the task ``modality-classification``.

    Attributes:
        items: How many items of the split (chosen by hash of their id); 0 takes all.
        batch_size: Items that are read at a time.
        label: Key of an item's label in its meta data.
    """

    items: int = 0
    batch_size: int = 64
    label: str = "label"
    metrics: ClassVar[Mapping[str, MetricInfo]] = METRICS

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.items < 0:
            raise ConfigError("modality-classification: batch_size is at least 1, items at least 0")

    def build(self) -> ModalityClassification:
        return ModalityClassification(self)


class ModalityClassification(Task):
    """The likeliest label of every item, and the label that is most frequent in the training split, as a baseline that
    looks at nothing."""

    name = "modality-classification"
    needs = (ClassifySamples,)
    config: ModalityClassificationConfig

    def run(self, model: Any, source: SourceLike, split: str, progress: Progress | None = None) -> TaskResult:
        import torch

        config = self.config
        ids = choose_ids(source, split, config.items)
        frequent = Counter(self._label(sample) for sample in text_samples(source, source.ids("train")))
        majority = min(frequent, key=lambda label: (-frequent[label], label))
        names = tuple(model.labels)
        place = {name: row for row, name in enumerate(names)}
        items: list[dict[str, Any]] = []
        shown, outputs = set(sample_ids(ids)), []
        for start in range(0, len(ids), config.batch_size):
            if progress:
                progress(self.name, start, len(ids))
            samples: list[Sample] = [source.sample(id) for id in ids[start : start + config.batch_size]]  # type: ignore[misc]
            labels = [self._label(sample) for sample in samples]
            unknown = next((label for label in labels if label not in place), None)
            if unknown is not None:
                raise DataError(
                    f"{self.name}: the label {unknown!r} of {source.name} is none of the model's"
                    f"{near(unknown, place)}: evaluate it on the data it was trained for"
                )
            chances = model.classify_samples(samples).double().cpu().log_softmax(1)  # [B, C]
            for sample, label, row in zip(samples, labels, chances, strict=True):
                named = names[int(row.argmax())]
                right, blind = float(named == label), float(majority == label)
                items.append(
                    {
                        "item": sample.id,
                        "cluster": cluster_of(sample),
                        "reference": label,
                        "output": named,
                        "right": right,
                        "majority": blind,
                        "gain": right - blind,
                        "nats": min(50.0, -float(row[place[label]])),
                    }
                )
                if sample.id in shown:
                    best = [names[i] for i in row.topk(min(3, len(names))).indices.tolist()]
                    outputs.append({"id": sample.id, "output": best, "label": label, "kind": "likeliest names"})
        if progress:
            progress(self.name, len(ids), len(ids))
        count = Counter(row["reference"] for row in items)
        for row in items:
            row["weight"] = 1 / count[row["reference"]]
            row["weighted_right"] = row["weight"] * row["right"]
        keys = ("right", "majority", "gain", "weighted_right", "weight", "nats")
        total = dict(
            zip(keys, torch.tensor([[r[k] for k in keys] for r in items]).double().sum(0).tolist(), strict=True)
        )
        metrics = {
            "accuracy": total["right"] / len(items),
            "majority": total["majority"] / len(items),
            "gain": total["gain"] / len(items),
            "accuracy_by_class": total["weighted_right"] / total["weight"],
            "log_loss": total["nats"] / len(items),
            "items": float(len(items)),
            "labels": float(len(names)),
        }
        return TaskResult(
            name=self.name, metrics=metrics, items=items, spec_hash=self.spec_hash(source, split), samples=outputs
        )

    def _label(self, sample: Any) -> str:
        found = sample.meta.get(self.config.label)
        if found is None:
            raise DataError(
                f"{self.name}: item {sample.id} has no {self.config.label!r}{near(self.config.label, sample.meta)}: set"
                " modality-classification.label, or choose data with labels"
            )
        return str(found)
