"""The loss of answers to questions (models/blip_vqa.py and models/model_vqa.py of BLIP's and ALBEF's releases)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from zoo.objectives.base import Objective, full_precision
from zoo.recipe import ObjectiveConfig

IGNORE = -100


@dataclass(frozen=True, kw_only=True)
class AnswersConfig(ObjectiveConfig):
    """Weighted cross-entropy of whole answers.

    Attributes:
        label_smoothing: Mass spread evenly over the vocabulary; BLIP 0.1.
    """

    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing = {self.label_smoothing} must be in [0, 1)")

    def build(self) -> Answers:
        return Answers(self)


class Answers(Objective):
    """Sum over answers of weight · (sum over the answer's tokens of the cross-entropy), in nats a question.

    A long answer therefore weighs more than a short one, and an answer most people gave more than one few gave.
    """

    learns: ClassVar[str] = "autoregressive"
    needs: ClassVar[frozenset[str]] = frozenset({"hidden", "targets", "answer_weights"})

    def __init__(self, config: AnswersConfig) -> None:
        super().__init__()
        self.label_smoothing = config.label_smoothing

    def forward(
        self, model: Any, batch: Mapping[str, Tensor], outputs: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of ``targets`` [A, T] (-100 = none), which rows of ``hidden`` [A, T, D] predict, with
        ``answer_weights`` [A], already divided by the number of questions."""
        loss = (outputs["answer_weights"] * self.per_answer(model, outputs["hidden"], outputs["targets"])).sum()
        return loss, {"tokens": (outputs["targets"] != IGNORE).sum()}

    def per_answer(self, model: Any, hidden: Tensor, targets: Tensor) -> Tensor:
        """[A] float32, the cross-entropy of each answer's tokens, summed; the answer's first token included."""
        logits = model.decoder.logits(hidden)  # [A, T, V]
        with full_precision(logits):
            loss = F.cross_entropy(
                logits.float().transpose(1, 2), targets, reduction="none", label_smoothing=self.label_smoothing
            )  # [A, T], zero where there is no target
        return loss.sum(1)
