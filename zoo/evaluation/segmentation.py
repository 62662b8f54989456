"""Masks of what a text names, judged by gIoU and cIoU as LISA defines them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from zoo.capabilities import SegmentImages
from zoo.data.sample import BadSample, BadSamples
from zoo.errors import ConfigError, DataError
from zoo.evaluation.catalogue import METRICS, MetricInfo
from zoo.evaluation.hallucination import objects_of
from zoo.evaluation.task import (
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
    thumbnail,
)

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True, kw_only=True)
class SegmentationConfig:
    """Fields of the task ``segmentation``.

    Attributes:
        items: how many images of the split (chosen by hash of their id); 0 takes all.
        batch_size: texts, each with its image, a forward pass.
        query: what is asked for, with ``{object}`` for its name.
        absent: names an image does not show that are asked for too; the right mask of them is empty.
    """

    items: int = 200
    batch_size: int = 64
    query: str = "the {object}"
    absent: int = 1
    metrics: ClassVar[Mapping[str, MetricInfo]] = METRICS["segmentation"]

    def __post_init__(self) -> None:
        if "{object}" not in self.query:
            raise ConfigError(f"segmentation.query = {self.query!r}: expected {{object}} in it")
        if self.batch_size < 1 or min(self.items, self.absent) < 0:
            raise ConfigError("segmentation: batch_size is at least 1, items and absent at least 0")

    def build(self) -> Segmentation:
        return Segmentation(self)


@dataclass(frozen=True, slots=True)
class Target:
    """One text and the mask [H, W] bool it stands for in an image."""

    item: str
    sample: SampleLike
    text: str
    mask: Tensor


class Segmentation(Task):
    """gIoU and cIoU of the pixels that show a named object: all objects of that name together.

    The source knows the masks: ``masks(id, width) -> [objects, H, W]`` in the order of ``meta["objects"]``
    (data=openmoji-scenes), or of ``meta["referred"]`` (data=refcoco): expressions that each name one object. Each of
    these is a target of its own and asked as it is, and no absent one is asked for, since another image's expression
    may well fit. Which absent names are asked for follows from a hash of the item and the name; they are
    other names of the split. ``giou_present`` leaves them out; ``absent_right`` is the share of them for which the
    model's mask is empty.
    """

    name = "segmentation"
    needs = (SegmentImages,)
    config: SegmentationConfig

    def run(self, model: Any, source: SourceLike, split: str, progress: Progress | None = None) -> TaskResult:
        if not callable(getattr(source, "masks", None)):
            raise DataError(
                f"{self.name}: {source.name} has no masks; use data=openmoji-scenes or data=refcoco, or leave the task"
                " out"
            )
        from zoo.evaluation.segmentation_metrics import CIoU, GIoU, overlaps

        ids = choose_ids(source, split, self.config.items)
        giou, ciou = GIoU(), CIoU()
        items: list[dict[str, Any]] = []
        shown = set(sample_ids(ids))
        pictures: dict[str, tuple[Image, Image]] = {}
        for part in self._batches(source, split, ids, progress):
            masks = _checked(model.segment_images([t.sample.image for t in part], [t.text for t in part]), part)
            for target, found in zip(part, masks, strict=True):
                pair = found[None], target.mask[None]
                giou.update(*pair)
                ciou.update(*pair)
                intersection, union = (int(value) for value in overlaps(*pair))
                items.append(_row(target, found, intersection, union))
                if target.sample.id in shown and target.sample.id not in pictures and bool(target.mask.any()):
                    image = target.sample.image
                    pictures[target.sample.id] = _tinted(image, found), _tinted(image, target.mask)
        if not items:
            raise DataError(
                f"{self.name}: no chosen image of {source.name} names an object in meta['objects'] or meta['referred']"
            )
        metrics = {"giou": float(giou.compute()), "ciou": float(ciou.compute())}
        for name, above, below in (
            ("giou_present", "iou_present", "present"),
            ("absent_right", "absent_right", "absent"),
        ):
            if count := sum(row[below] for row in items):
                metrics[name] = sum(row[above] for row in items) / count
        metrics |= {"targets": float(len(items)), "images": float(len({row["sample"] for row in items}))}
        return TaskResult(
            name=self.name,
            metrics=metrics,
            items=items,
            spec_hash=self.spec_hash(source, split),
            samples=[
                {
                    "id": i,
                    "output": [f"{r['text']}: {r['iou']:.2f}" for r in items if r["sample"] == i],
                    "picture": thumbnail(found),
                    "mask wanted": thumbnail(wanted),
                    "kind": "segmented",
                }
                for i, (found, wanted) in pictures.items()
            ],
        )

    def _batches(
        self, source: Any, split: str, ids: Sequence[str], progress: Progress | None
    ) -> Iterator[list[Target]]:
        """Yield targets ``batch_size`` at a time."""
        size, waiting = self.config.batch_size, list[Target]()
        bad = BadSamples(source.name, getattr(source, "max_bad", 0))
        everything: list[str] = []
        if self.config.absent:
            found = (name for sample in text_samples(source, source.ids(split)) for name in objects_of(sample))
            everything = list(dict.fromkeys(found))
        for samples in batches(self.name, source, ids, 16, progress):
            for sample in samples:
                try:
                    waiting += self._targets(source, sample, everything)
                except BadSample as error:
                    bad.add(error.id, error.reason)
            while len(waiting) >= size:
                yield waiting[:size]
                waiting = waiting[size:]
        if waiting:
            yield waiting

    def _targets(self, source: Any, sample: SampleLike, everything: Sequence[str]) -> list[Target]:
        image: Any = sample.image
        width, height = image.size
        masks = torch.as_tensor(source.masks(sample.id, width))  # [objects, H, W]
        referred = [str(o["text"]) for o in sample.meta.get("referred") or ()]
        named = referred or [o["name"] for o in sample.meta.get("objects") or ()]
        if tuple(masks.shape) != (len(named), height, width):
            raise DataError(
                f"{self.name}: {source.name} gives masks of shape {tuple(masks.shape)} for the {len(named)} objects of"
                f" {sample.id}, an image of {width}x{height} pixels"
            )
        if referred:
            return [Target(f"{sample.id}/{n}", sample, text, masks[n]) for n, text in enumerate(referred)]
        own = objects_of(sample)
        wanted = {name: masks[[n == name for n in named]].any(0) for name in own}
        others = sorted(
            (name for name in everything if name not in wanted),
            key=lambda name: hashlib.sha256(f"segmentation/{sample.id}/{name}".encode()).digest(),
        )
        wanted |= {name: torch.zeros(height, width, dtype=torch.bool) for name in others[: self.config.absent]}
        return [
            Target(f"{sample.id}/{n}", sample, self.config.query.replace("{object}", name), mask)
            for n, (name, mask) in enumerate(wanted.items())
        ]


def _checked(masks: Sequence[Tensor], part: Sequence[Target]) -> list[Tensor]:
    """The model's masks on the CPU.

    Raises:
        ConfigError: another number, shape or dtype than asked for.
    """
    found = [torch.as_tensor(mask).cpu() for mask in masks]
    if len(found) != len(part):
        raise ConfigError(f"segmentation: segment_images gave {len(found)} masks for {len(part)} texts")
    for mask, target in zip(found, part, strict=True):
        if mask.dtype != torch.bool or mask.shape != target.mask.shape:
            raise ConfigError(
                f"segmentation: segment_images gave a mask of {tuple(mask.shape)} {mask.dtype} for an image of"
                f" {tuple(target.mask.shape)} (height, width): expected bool of that shape"
            )
    return found


def _row(target: Target, found: Tensor, intersection: int, union: int) -> dict[str, Any]:
    from zoo.evaluation.segmentation_metrics import ious

    present = bool(target.mask.any())
    iou = float(ious(torch.tensor([intersection]), torch.tensor([union])))
    return {
        "item": target.item,
        "cluster": cluster_of(target.sample),
        "sample": target.sample.id,
        "text": target.text,
        "intersection": float(intersection),
        "union": float(union),
        "iou": iou,
        "present": float(present),
        "absent": float(not present),
        "iou_present": iou * present,
        "absent_right": float(not present and not bool(found.any())),
    }


def _tinted(image: Any, mask: Tensor) -> Image:
    """The image with everything outside the mask faded."""
    import numpy as np
    from PIL import Image as pil

    pixels = np.asarray(image.convert("RGB")).astype(np.float32)
    inside = mask.numpy()[..., None]
    return pil.fromarray(np.where(inside, pixels, 0.25 * pixels + 0.75 * 255).astype(np.uint8))
