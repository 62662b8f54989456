"""The loss of answers, distilled from a momentum copy (ALBEF, arXiv 2107.07651, models/model_vqa.py and xbert.py)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.objectives.base import Objective, full_precision
from zoo.objectives.momentum import DistilledConfig

IGNORE = -100


@dataclass(frozen=True, kw_only=True)
class DistilledAnswersConfig(DistilledConfig):
    """Weighted cross-entropy of whole answers, partly against the momentum copy's words."""

    def build(self) -> DistilledAnswers:
        return DistilledAnswers(self)


class DistilledAnswers(Objective):
    """Sum over answers of weight · (sum over tokens of (1 - alpha) cross-entropy + alpha soft cross-entropy)."""

    learns: ClassVar[str] = "autoregressive"
    needs: ClassVar[frozenset[str]] = frozenset({"hidden", "targets", "answer_weights"})

    def __init__(self, config: DistilledAnswersConfig) -> None:
        super().__init__()
        self.config = config
        self.momentum_rate = config.momentum if config.alpha else None

    def forward(
        self, model: Any, batch: Mapping[str, Tensor], outputs: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss in nats a question, of ``targets`` [A, T] (-100 = none), which rows of ``hidden`` [A, T, D] predict,
        with ``answer_weights`` [A], already divided by the number of questions."""
        each, alpha = self.per_answer(model, batch, outputs)
        report = {"tokens": (outputs["targets"] != IGNORE).sum()}
        if alpha is not None:
            report["alpha"] = alpha
        return (outputs["answer_weights"] * each).sum(), report

    def per_answer(
        self, model: Any, batch: Mapping[str, Tensor], outputs: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """The loss of each answer [A] float32, and alpha where there is a copy to learn from."""
        targets = outputs["targets"]
        logits = model.decoder.logits(outputs["hidden"])  # [A, T, V]
        with full_precision(logits):
            log = logits.float().log_softmax(-1)
            hard = F.nll_loss(log.transpose(1, 2), targets, ignore_index=IGNORE, reduction="none").sum(1)
        if self.momentum_rate is None or self.momentum is None:
            return hard, None
        with torch.no_grad():
            teacher = self.momentum.teacher
            soft = teacher.decoder.logits(teacher(batch)["hidden"]).float().softmax(-1)
        kept = targets != IGNORE
        distilled = (-(soft * log).sum(-1) * kept).sum(1)
        alpha = self.momentum.share(self.config)
        return (1 - alpha) * hard + alpha * distilled, alpha
