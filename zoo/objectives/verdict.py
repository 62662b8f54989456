"""Cross-entropy of judgements: a statement is true or false."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from zoo.objectives.base import Objective, full_precision
from zoo.recipe import ObjectiveConfig


@dataclass(frozen=True, kw_only=True)
class VerdictConfig(ObjectiveConfig):
    """Cross-entropy of (false, true)."""

    def build(self) -> Verdict:
        return Verdict()


class Verdict(Objective):
    """Mean cross-entropy, in nats."""

    learns: ClassVar[str] = "classification"
    needs: ClassVar[frozenset[str]] = frozenset({"verdict_logits", "verdicts"})

    def forward(
        self, model: Any, batch: Mapping[str, Tensor], outputs: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of ``verdict_logits`` [B, 2] for ``verdicts`` [B]; reports ``accuracy``."""
        logits, verdicts = outputs["verdict_logits"], outputs["verdicts"]
        with full_precision(logits):
            loss = F.cross_entropy(logits.float(), verdicts)
        return loss, {"accuracy": (logits.detach().argmax(-1) == verdicts).float().mean()}
