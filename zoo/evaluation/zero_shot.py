"""Classifying images by the nearest text of a class, with ensembles of templates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from zoo.capabilities import EmbedImages, EmbedTexts
from zoo.errors import ConfigError, DataError, near
from zoo.evaluation.catalogue import METRICS, MetricInfo
from zoo.evaluation.naming import name_of
from zoo.evaluation.task import (
    COSINE_TIE,
    Progress,
    SampleLike,
    SourceLike,
    Task,
    TaskResult,
    batches,
    choose_ids,
    cluster_of,
    sample_ids,
    text_samples,
)

if TYPE_CHECKING:
    from torch import Tensor

TEMPLATES: Mapping[str, tuple[str, ...]] = {
    "plain": ("{}",),
    "icons": ("{}", "an icon of {}", "an emoji of {}", "a drawing of {}", "a picture of {}", "{} icon", "{} emoji"),
    # the seven of the CLIP release's notebook on prompts, open_clip's SIMPLE_IMAGENET_TEMPLATES
    "simple": (
        "itap of a {}.",
        "a bad photo of the {}.",
        "a origami {}.",
        "a photo of the large {}.",
        "a {} in a video game.",
        "art of the {}.",
        "a photo of the small {}.",
    ),
}
"""Name -> templates; the vectors of a class are averaged over them."""


@dataclass(frozen=True, kw_only=True)
class ZeroShotConfig:
    """Fields of the task ``zero-shot``.

    Attributes:
        items: how many images of the split (chosen by hash of their id); 0 takes all.
        batch_size: images or texts a forward pass.
        label: where a sample's class stands: ``name``, or a key of its meta data (``role``, ``skin_tone``, ``gender``
            of data=openmoji). Samples without it are left out.
        templates: ``plain``, ``icons``, ``simple``, or templates of your own with {} for the class, parted by ``|``.
    """

    items: int = 0
    batch_size: int = 64
    label: str = "name"
    templates: str = "plain"
    metrics: ClassVar[Mapping[str, MetricInfo]] = METRICS["zero-shot"]

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.items < 0:
            raise ConfigError("zero-shot: batch_size is at least 1, items at least 0")
        if self.templates not in TEMPLATES and not all("{}" in part for part in self.templates.split("|")):
            raise ConfigError(
                f"zero-shot.templates = {self.templates!r}{near(self.templates, TEMPLATES)}: expected"
                f" {', '.join(TEMPLATES)}, or templates with {{}} in each, parted by |"
            )

    def build(self) -> ZeroShot:
        return ZeroShot(self)

    @property
    def patterns(self) -> tuple[str, ...]:
        """The templates themselves."""
        return TEMPLATES.get(self.templates) or tuple(part.strip() for part in self.templates.split("|"))


def class_vectors(model: Any, classes: Sequence[str], patterns: Sequence[str], size: int) -> Tensor:
    """Return [C, D] float32 of unit length: the mean of the unit vectors of a class in all templates (Radford et al.
    2021, section 3.1.4; open_clip's ``build_zero_shot_classifier``).

    Args:
        model: offers ``embed_texts``.
        size: texts a forward pass.
    """
    import torch
    import torch.nn.functional as F

    texts = [pattern.replace("{}", name) for name in classes for pattern in patterns]
    rows = torch.cat([model.embed_texts(texts[i : i + size]).float().cpu() for i in range(0, len(texts), size)])
    return F.normalize(F.normalize(rows, dim=-1).view(len(classes), len(patterns), -1).mean(1), dim=-1)


class ZeroShot(Task):
    """Top-1 and top-5 among all classes of the split, and top-1 as a mean over classes.

    The classes are the distinct labels of the whole split, whatever ``items`` says. Ties count against the model
    (`metrics.ranks_of`), so that one that gives every class one score is right about none; where there are no ties
    the values are those of torchmetrics' ``MulticlassAccuracy``.
    """

    name = "zero-shot"
    needs = (EmbedImages, EmbedTexts)
    config: ZeroShotConfig

    def spec(self, source: SourceLike, split: str) -> dict[str, Any]:
        return {
            **super().spec(source, split),
            "templates": list(self.config.patterns),
            "ties": f"against the model, within {COSINE_TIE}",
        }

    def run(self, model: Any, source: SourceLike, split: str, progress: Progress | None = None) -> TaskResult:
        import torch

        from zoo.evaluation.metrics import RankMetric, ranks_of, similarity

        config = self.config
        labels, keys = dict[str, str](), set[str]()
        for sample in text_samples(source, source.ids(split)):
            keys |= set(sample.meta)
            if label := self._label(sample):
                labels[sample.id] = label
        classes = sorted(set(labels.values()))
        if len(classes) < 2:
            raise DataError(
                f"{self.name}: label = {config.label!r} has {len(classes)} classes in the {split} split of"
                f" {source.name}{near(config.label, keys)}: expected name, or a key of the samples' meta data"
                f" ({', '.join(sorted(keys)) or 'they have none'}) with at least 2 values"
            )
        ids = [i for i in choose_ids(source, split, config.items) if i in labels]
        if not ids:
            raise DataError(f"{self.name}: none of the chosen items has a {config.label!r}; raise items")
        place = {name: row for row, name in enumerate(classes)}
        frequency = Counter(labels[i] for i in ids)
        vectors = class_vectors(model, classes, config.patterns, config.batch_size)  # [C, D]
        metric = RankMetric(len(classes), (1, 5))
        items: list[dict[str, Any]] = []
        shown, outputs = set(sample_ids(ids)), []
        for samples in batches(self.name, source, ids, config.batch_size, progress):
            scores = similarity(model.embed_images([s.image for s in samples]).float().cpu(), vectors)  # [B, C]
            ranks = ranks_of(scores, [[place[labels[s.id]]] for s in samples], COSINE_TIE)
            metric.update(ranks)
            best = scores.topk(min(3, len(classes)), dim=1).indices.tolist()
            for sample, rank, nearest in zip(samples, ranks.tolist(), best, strict=True):
                weight = 1 / frequency[labels[sample.id]]
                items.append(
                    {
                        "item": sample.id,
                        "cluster": cluster_of(sample),
                        "reference": labels[sample.id],
                        "output": classes[nearest[0]],
                        "rank": rank,
                        "top1": float(rank == 1),
                        "top5": float(rank <= 5),
                        "weight": weight,
                        "weighted_top1": weight * (rank == 1),
                    }
                )
                if sample.id in shown:
                    near_ones = [classes[c] for c in nearest]
                    outputs.append({"id": sample.id, "output": near_ones, "rank": rank, "kind": "likeliest names"})
        ranked = metric.compute()
        weights = torch.tensor([[row["weighted_top1"], row["weight"]] for row in items], dtype=torch.float64).sum(0)
        metrics = {"top1": float(ranked["r1"]), "top1_by_class": float(weights[0] / weights[1])}
        if len(classes) > 5:
            metrics["top5"] = float(ranked["r5"])
        left_out = len(source.ids(split)) - len(labels)
        metrics |= {"images": float(len(items)), "classes": float(len(classes)), "left_out": float(left_out)}
        return TaskResult(
            name=self.name, metrics=metrics, items=items, spec_hash=self.spec_hash(source, split), samples=outputs
        )

    def _label(self, sample: SampleLike) -> str:
        if self.config.label == "name":
            return name_of(sample) if sample.texts or sample.meta.get("name") else ""
        found = sample.meta.get(self.config.label)
        return "" if found is None or isinstance(found, (list, tuple, dict)) else str(found)
