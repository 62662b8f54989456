"""Answers with several masks, scored as MUSE scores them: one score a question, whatever the order of its masks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from zoo.capabilities import MaskedText, SegmentInText
from zoo.errors import ConfigError, DataError
from zoo.evaluation.metric_info import MetricInfo
from zoo.evaluation.task import Progress, SourceLike, TaskResult, choose_ids, cluster_of, sample_ids
from zoo_grounding.masks import IGNORED
from zoo_grounding.muse_metric import matched
from zoo_grounding.task import Asked, Grounding, GroundingConfig, shown_answer

MANY = 3
"""Targets from which on an answer has many."""


def _share(label: str, above: str, below: str, help: str) -> MetricInfo:
    return MetricInfo(label=label, numerator=above, denominator=below, percent=True, help=help)


@dataclass(frozen=True, kw_only=True)
class MuseTaskConfig(GroundingConfig):
    """Fields of the task ``muse``: those of ``grounding``. Answers may be long: one that breaks off within a target has
    no mask at all."""

    max_new_tokens: int = 96
    metrics: ClassVar[Mapping[str, MetricInfo]] = {
        "giou": MetricInfo(
            label="gIoU", numerator="score", percent=True, primary=True,
            help="a question's sum of intersections over unions, found and wanted masks paired at best, over the larger"
            " number of the two; the mean over questions",
        ),
        "ciou": _share("cIoU", "intersection", "union", "all intersections over all unions, lone masks added"),
        "giou_one": _share("gIoU, one", "score_one", "one", "gIoU of questions with one target"),
        "giou_several": _share("gIoU, several", "score_several", "several", "gIoU of questions with several targets"),
        "giou_many": _share("gIoU, many", "score_many", "many", "gIoU of questions with three targets or more"),
        "count_right": MetricInfo(
            label="right number", numerator="count_right", percent=True, help="answers with the right number of masks"
        ),
    }  # fmt: skip

    def build(self) -> MuseTask:
        return MuseTask(self)


class MuseTask(Grounding):
    """gIoU and cIoU of whole answers (``zoo_grounding.muse_metric``); what is asked is as in ``grounding``.

    Pixels of value 255 count nowhere. A question without a target scores 1 where the answer has no mask.
    """

    name = "muse"
    needs = (SegmentInText,)
    config: MuseTaskConfig

    def run(self, model: Any, source: SourceLike, split: str, progress: Progress | None = None) -> TaskResult:
        ids = choose_ids(source, split, self.config.items)
        rows: list[dict[str, Any]] = []
        pictured = set(sample_ids(ids))
        samples: dict[str, dict[str, Any]] = {}
        for asked, answer in self.answers(model, source, ids, progress):
            rows.append(_row(asked, answer))
            if asked.sample.id in pictured and asked.sample.id not in samples:
                samples[asked.sample.id] = shown_answer(asked, answer)
        if not rows:
            raise DataError(
                f"{self.name}: no chosen sample of {source.name} has questions with masks (meta: turns, masks);"
                " use data=muse, data=muse-coco or data=muse-scenes, or leave the task out"
            )
        metrics: dict[str, float] = {}
        for name, info in self.config.metrics.items():
            count = sum(row[info.denominator] for row in rows) if info.denominator else len(rows)
            if count:
                metrics[name] = sum(row[info.numerator] for row in rows) / count
        metrics |= {"questions": float(len(rows)), "targets": sum(row["targets"] for row in rows)}
        return TaskResult(
            name=self.name,
            metrics=metrics,
            items=rows,
            spec_hash=self.spec_hash(source, split),
            samples=list(samples.values()),
        )


def _row(asked: Asked, answer: MaskedText) -> dict[str, Any]:
    image = asked.sample.image
    size = (image.height, image.width)
    if answer.masks.dtype != torch.bool or tuple(answer.masks.shape[1:]) != size:
        raise ConfigError(
            f"muse: segment gave masks of {tuple(answer.masks.shape)} {answer.masks.dtype} for an image of {size}"
            " (height, width): expected bool [masks, height, width]"
        )
    wanted = torch.stack(list(asked.masks)) if asked.masks else torch.zeros(0, *size, dtype=torch.uint8)
    scored = (wanted != IGNORED).all(0)
    pair = matched(answer.masks.cpu() & scored, (wanted == 1) & scored)
    count = len(wanted)
    groups = {"one": count == 1, "several": count > 1, "many": count >= MANY}
    return {
        "item": asked.item,
        "cluster": cluster_of(asked.sample),
        "sample": asked.sample.id,
        "kind": asked.kind,
        "score": pair.score,
        "intersection": float(pair.intersection),
        "union": float(pair.union),
        "targets": float(count),
        **{name: float(holds) for name, holds in groups.items()},
        **{f"score_{name}": pair.score * holds for name, holds in groups.items()},
        "count_right": float(count == len(answer.masks)),
    }
