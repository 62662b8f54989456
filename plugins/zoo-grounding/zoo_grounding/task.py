"""The source's own questions, answered with masks: gIoU and cIoU where an answer may have several targets or none."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from zoo.capabilities import MaskedText, SegmentInText
from zoo.errors import ConfigError, DataError
from zoo.evaluation.metric_info import MetricInfo
from zoo.evaluation.task import Progress, SourceLike, Task, TaskResult, batches, choose_ids, cluster_of, sample_ids
from zoo.evaluation.task import thumbnail as small
from zoo_grounding.marks import TARGET
from zoo_grounding.masks import IGNORED, as_masks
from zoo_grounding.overlay import overlay


def share(label: str, above: str, below: str, help: str, detail: bool = False) -> MetricInfo:
    """A metric in percent: the sum of one column of the rows over the sum of another."""
    return MetricInfo(label=label, numerator=above, denominator=below, percent=True, detail=detail, help=help)


@dataclass(frozen=True, kw_only=True)
class GroundingConfig:
    """Fields of the task ``grounding``.

    Attributes:
        items: how many images of the split (chosen by hash of their id); 0 takes all.
        batch_size: questions, each with its image, a forward pass.
        max_new_tokens: most tokens of an answer.
    """

    items: int = 200
    batch_size: int = 32
    max_new_tokens: int = 48
    metrics: ClassVar[Mapping[str, MetricInfo]] = {
        "giou": MetricInfo(
            label="gIoU", numerator="iou", percent=True, primary=True,
            help="mean intersection over union of the targets; a missing or extra mask is 0, rightly none is 1",
        ),
        "ciou": share("cIoU", "intersection", "union", "all intersections over all unions"),
        "giou_one": share("gIoU, one", "iou_one", "one", "gIoU of questions with one target"),
        "giou_several": share("gIoU, several", "iou_several", "several", "gIoU of questions with several targets"),
        "absent_right": share("none, none", "absent_right", "absent", "questions without a target, no mask"),
        "count_right": share("right number", "count_right", "question", "answers with the right number of masks"),
        "giou_part": share("gIoU, parts", "iou_part", "part", "gIoU of hair and skin", detail=True),
        "giou_reason": share("gIoU, reasoning", "iou_reason", "reason", "gIoU of what is not named", detail=True),
    }  # fmt: skip

    def __post_init__(self) -> None:
        if self.items < 0 or min(self.batch_size, self.max_new_tokens) < 1:
            raise ConfigError("grounding: batch_size and max_new_tokens are at least 1, items at least 0")

    def build(self) -> Grounding:
        return Grounding(self)


@dataclass(frozen=True, slots=True)
class Asked:
    """A question about a sample, and the masks [H, W] uint8 of its targets in order."""

    item: str
    sample: Any
    question: str
    kind: str
    masks: tuple[Tensor, ...]


class Grounding(Task):
    """gIoU and cIoU as LISA defines them, over the targets of all answers.

    Every question of a sample (``meta["turns"]``, whose answers write ``{seg}`` once a target, and ``meta["masks"]``)
    is asked by itself. The k-th mask of the answer is compared with the k-th target; a target without a mask, and a
    mask without a target, count as an intersection of nothing. A question without targets counts 1 if the answer has no
    mask. Pixels of value 255 count nowhere.
    """

    name = "grounding"
    needs = (SegmentInText,)
    sources = "data=openmoji-grounding or data=reason-seg"
    """What has questions with masks, for the error message."""

    config: GroundingConfig

    def rows(self, asked: Asked, answer: MaskedText) -> list[dict[str, Any]]:
        """One row a target or mask of the answer, whichever are more; one for a question that rightly has neither."""
        return _rows(asked, answer)

    def counts(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """What is counted beside the metrics."""
        return {"questions": float(sum(row["question"] for row in rows)), "masks": float(len(rows))}

    def run(self, model: Any, source: SourceLike, split: str, progress: Progress | None = None) -> TaskResult:
        ids = choose_ids(source, split, self.config.items)
        rows: list[dict[str, Any]] = []
        shown = set(sample_ids(ids))
        samples: dict[str, dict[str, Any]] = {}
        for asked, answer in self.answers(model, source, ids, progress):
            rows += self.rows(asked, answer)
            if asked.sample.id in shown and asked.sample.id not in samples:
                samples[asked.sample.id] = shown_answer(asked, answer)
        if not rows:
            raise DataError(
                f"{self.name}: no chosen sample of {source.name} has questions with masks (meta: turns, masks);"
                f" use {self.sources}, or leave the task out"
            )
        metrics: dict[str, float] = {}
        for name, info in self.config.metrics.items():
            count = sum(row[info.denominator] for row in rows) if info.denominator else len(rows)
            if count:
                metrics[name] = sum(row[info.numerator] for row in rows) / count
        return TaskResult(
            name=self.name,
            metrics=metrics | self.counts(rows),
            items=rows,
            spec_hash=self.spec_hash(source, split),
            samples=list(samples.values()),
        )

    def answers(
        self, model: Any, source: SourceLike, ids: Sequence[str], progress: Progress | None
    ) -> Iterator[tuple[Asked, MaskedText]]:
        """Yield every question of the samples with the model's answer.

        Raises:
            ConfigError: the model gives another number of answers than questions.
            DataError: a sample whose masks are not those its answers name.
        """
        for part in self._batches(source, ids, progress):
            found: list[MaskedText] = model.segment(
                [asked.sample.image for asked in part], [asked.question for asked in part], self.config.max_new_tokens
            )
            if len(found) != len(part):
                raise ConfigError(f"{self.name}: segment gave {len(found)} answers to {len(part)} questions")
            yield from zip(part, found, strict=True)

    def _batches(self, source: SourceLike, ids: Sequence[str], progress: Progress | None) -> Iterator[list[Asked]]:
        waiting: list[Asked] = []
        for samples in batches(self.name, source, ids, 16, progress):
            waiting += [asked for sample in samples for asked in _questions(sample)]
            while len(waiting) >= self.config.batch_size:
                yield waiting[: self.config.batch_size]
                waiting = waiting[self.config.batch_size :]
        if waiting:
            yield waiting


def _questions(sample: Any) -> list[Asked]:
    """Every question of a sample with its share of the masks.

    Raises:
        DataError: the answers name another number of targets than there are masks.
    """
    turns = [(str(q), str(a)) for q, a in sample.meta.get("turns") or ()]
    about = sample.meta.get("questions") or [{}] * len(turns)
    masks = as_masks(sample.meta.get("masks") or ())
    if not turns or "masks" not in sample.meta:
        return []
    if len(masks) != sum(answer.count(TARGET) for _, answer in turns):
        raise DataError(f"sample {sample.id!r}: its answers name other than {len(masks)} targets, which have masks")
    found: list[Asked] = []
    for number, (question, answer) in enumerate(turns):
        own, masks = masks[: answer.count(TARGET)], masks[answer.count(TARGET) :]
        kind = str(about[number].get("kind", "")) if number < len(about) else ""
        found.append(Asked(f"{sample.id}/{number}", sample, question, kind, tuple(own)))
    return found


def checked_size(task: str, asked: Asked, answer: MaskedText) -> tuple[int, int]:
    """The (height, width) of the image.

    Raises:
        ConfigError: the answer's masks are not bool [masks, height, width].
    """
    image = asked.sample.image
    size = (image.height, image.width)
    if answer.masks.dtype != torch.bool or tuple(answer.masks.shape[1:]) != size:
        raise ConfigError(
            f"{task}: segment gave masks of {tuple(answer.masks.shape)} {answer.masks.dtype} for an image of {size}"
            " (height, width): expected bool [masks, height, width]"
        )
    return size


def _rows(asked: Asked, answer: MaskedText) -> list[dict[str, Any]]:
    from zoo.evaluation.segmentation_metrics import ious, overlaps

    size = checked_size("grounding", asked, answer)
    wanted, found = asked.masks, list(answer.masks.cpu())
    nothing = torch.zeros(size, dtype=torch.bool)
    rows: list[dict[str, Any]] = []
    for number in range(max(len(wanted), len(found), 1)):
        target = wanted[number] if number < len(wanted) else None
        scored = nothing == 0 if target is None else target != IGNORED
        right = nothing if target is None else target == 1
        drawn = found[number] & scored if number < len(found) else nothing
        intersection, union = (int(v) for v in overlaps(drawn[None], right[None]))
        iou = float(ious(torch.tensor([intersection]), torch.tensor([union])))
        if number < len(found) and target is None:
            iou = 0.0  # an empty mask too is a target that is not there
        groups = {
            "one": len(wanted) == 1,
            "several": len(wanted) > 1,
            "part": asked.kind == "part",
            "reason": asked.kind == "reason",
        }
        rows.append(
            {
                "item": f"{asked.item}/{number}",
                "cluster": cluster_of(asked.sample),
                "sample": asked.sample.id,
                "kind": asked.kind,
                "iou": iou,
                "intersection": float(intersection),
                "union": float(union),
                **{name: float(holds) for name, holds in groups.items()},
                **{f"iou_{name}": iou * holds for name, holds in groups.items()},
                "question": float(number == 0),
                "count_right": float(number == 0 and len(wanted) == len(found)),
                "absent": float(number == 0 and not wanted),
                "absent_right": float(number == 0 and not wanted and not found),
            }
        )
    return rows


def shown_answer(asked: Asked, answer: MaskedText) -> dict[str, Any]:
    """What a report shows of an answer."""
    image = asked.sample.image
    wanted = torch.stack([mask == 1 for mask in asked.masks]) if asked.masks else answer.masks[:0].cpu()
    return {
        "id": asked.sample.id,
        "output": [asked.question, answer.text],
        "picture": small(overlay(image, answer.masks.cpu())),
        "mask wanted": small(overlay(image, wanted)),
        "kind": "segmented",
    }
