"""The loss of a head over labels: one right label, or any number of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.objectives.base import Objective, full_precision, over_ranks
from zoo.recipe import ObjectiveConfig

KINDS = ("one", "any")


@dataclass(frozen=True, kw_only=True)
class LabelsConfig(ObjectiveConfig):
    """Cross-entropy over labels.

    Attributes:
        right: ``one`` label is right (softmax), or ``any`` number, each to a degree (sigmoid; VQA).
        label_smoothing: Mass spread evenly over the labels, where one is right.
    """

    right: str = "one"
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        if self.right not in KINDS:
            raise ValueError(f"right = {self.right!r} must be one of {', '.join(KINDS)}")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing = {self.label_smoothing} must be in [0, 1)")

    def build(self) -> Labels:
        return Labels(self)


class Labels(Objective):
    """``one``: softmax cross-entropy, mean over the items that have a label. ``any``: binary cross-entropy, summed over
    the labels and averaged over the items (unilm, beit3: mean over all, times the number of answers)."""

    learns: ClassVar[str] = "classification"
    needs: ClassVar[frozenset[str]] = frozenset({"label_logits", "label_targets"})

    def __init__(self, config: LabelsConfig) -> None:
        super().__init__()
        self.config = config

    def forward(
        self, model: Any, batch: Mapping[str, Tensor], outputs: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of ``label_logits`` [B, C] against ``label_targets`` [B, C], the share of each label; reports
        ``accuracy``, the mean target of the likeliest label over the items that have one."""
        logits, targets = outputs["label_logits"], outputs["label_targets"]
        has = (targets.sum(1) > 0).float()
        with full_precision(logits):
            logits, targets = logits.float(), targets.float()
            if self.config.right == "any":
                loss = F.binary_cross_entropy_with_logits(logits, targets) * logits.shape[1]
            else:
                each = F.cross_entropy(logits, targets, reduction="none", label_smoothing=self.config.label_smoothing)
                loss = (each * has).sum() / over_ranks(has.sum())[1]
        with torch.no_grad():
            best = targets.gather(1, logits.argmax(1, keepdim=True))[:, 0]
            accuracy = (best * has).sum() / has.sum().clamp(min=1)
        return loss, {"accuracy": accuracy}
