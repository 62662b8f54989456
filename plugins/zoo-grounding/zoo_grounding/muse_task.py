"""Answers with several masks, scored as MUSE scores them: one score a question, whatever the order of its masks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from zoo.capabilities import MaskedText
from zoo.evaluation.metric_info import MetricInfo
from zoo.evaluation.task import cluster_of
from zoo_grounding.masks import IGNORED
from zoo_grounding.muse_metric import matched
from zoo_grounding.task import Asked, Grounding, GroundingConfig, checked_size, share

MANY = 3
"""Targets from which on an answer has many."""


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
        "ciou": share("cIoU", "intersection", "union", "all intersections over all unions, lone masks added"),
        "giou_one": share("gIoU, one", "score_one", "one", "gIoU of questions with one target"),
        "giou_several": share("gIoU, several", "score_several", "several", "gIoU of questions with several targets"),
        "giou_many": share("gIoU, many", "score_many", "many", "gIoU of questions with three targets or more"),
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
    sources = "data=muse, data=muse-coco or data=muse-scenes"
    config: MuseTaskConfig

    def rows(self, asked: Asked, answer: MaskedText) -> list[dict[str, Any]]:
        """One row a question."""
        return [_row(asked, answer)]

    def counts(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        return {"questions": float(len(rows)), "targets": sum(row["targets"] for row in rows)}


def _row(asked: Asked, answer: MaskedText) -> dict[str, Any]:
    size = checked_size("muse", asked, answer)
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
