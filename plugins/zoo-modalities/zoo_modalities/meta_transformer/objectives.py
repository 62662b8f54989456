"""Losses of numbers (L1 of molecules, MSE of forecasts) and of labelled elements (segmentation)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.objectives.base import Objective, full_precision, over_ranks
from zoo.recipe import ObjectiveConfig


@dataclass(frozen=True, kw_only=True)
class RegressionConfig(ObjectiveConfig):
    """Distance between values and targets.

    Attributes:
        loss: ``l2``, the mean squared difference (forecasting), or ``l1``, the mean absolute one (PCQM4Mv2).
    """

    loss: Literal["l1", "l2"] = "l2"

    def build(self) -> Regression:
        return Regression(self)


class Regression(Objective):
    """Mean over items and values."""

    learns: ClassVar[str] = "regression"
    needs: ClassVar[frozenset[str]] = frozenset({"values", "value_targets"})

    def __init__(self, config: RegressionConfig) -> None:
        super().__init__()
        self.config = config

    def forward(
        self, model: Any, batch: Mapping[str, Tensor], outputs: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of ``values`` [B, C] against ``value_targets`` [B, C]; reports ``mean_loss``, that of
        the batch's mean."""
        values, targets = outputs["values"], outputs["value_targets"]
        measure = F.l1_loss if self.config.loss == "l1" else F.mse_loss
        with full_precision(values):
            loss = measure(values.float(), targets.float())
        with torch.no_grad():
            constant = measure(targets.float().mean(0, keepdim=True).expand_as(targets), targets.float())
        return loss, {"mean_loss": constant}


@dataclass(frozen=True, kw_only=True)
class ElementLabelsConfig(ObjectiveConfig):
    """Cross-entropy over the labels of elements.

    Attributes:
        label_smoothing: Mass spread evenly over the labels.
    """

    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing = {self.label_smoothing} must be in [0, 1)")

    def build(self) -> ElementLabels:
        return ElementLabels(self)


class ElementLabels(Objective):
    """Mean over the elements that have a label."""

    learns: ClassVar[str] = "segmentation"
    needs: ClassVar[frozenset[str]] = frozenset({"element_logits", "element_targets"})

    def __init__(self, config: ElementLabelsConfig) -> None:
        super().__init__()
        self.config = config

    def forward(
        self, model: Any, batch: Mapping[str, Tensor], outputs: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of ``element_logits`` [B, N, C] against ``element_targets`` [B, N] (-100 = none); reports
        ``accuracy``."""
        logits, targets = outputs["element_logits"].flatten(0, 1), outputs["element_targets"].flatten()
        has = targets >= 0
        with full_precision(logits):
            smoothing = self.config.label_smoothing
            total = F.cross_entropy(logits.float(), targets, reduction="sum", label_smoothing=smoothing)
            loss = total / over_ranks(has.sum())[1]
        with torch.no_grad():
            right = ((logits.argmax(1) == targets) & has).sum() / has.sum().clamp(min=1)
        return loss, {"accuracy": right}
