"""Objectives that read masks: what a mask costs on average, over all masks of the batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from zoo.objectives.base import Objective, full_precision
from zoo.recipe import ObjectiveConfig
from zoo_grounding.losses import bce_of, dice_of

TINY = 1e-8
"""Beside the number of masks, as LISA divides."""


class MaskObjective(Objective):
    """The sum of ``each`` over the batch's masks, divided by their number.

    Attributes:
        word: What the report calls it.
    """

    learns: ClassVar[str] = "segmentation"
    needs: ClassVar[frozenset[str]] = frozenset({"mask_logits", "mask_targets", "mask_shown"})
    word: ClassVar[str] = "masks"

    def each(self, outputs: Mapping[str, Tensor]) -> Tensor:
        """The loss [M] of every mask, from logits, targets and ``mask_shown`` [M, H, W] at the images' sizes."""
        raise TypeError(f"{type(self).__name__} defines no each")

    def forward(
        self, model: Any, batch: Mapping[str, Tensor], outputs: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """A batch without masks costs exactly 0, connected to the graph. With several processes each divides by the
        mean number of masks a process, so that all masks count alike."""
        with full_precision(outputs["mask_logits"]):
            losses = self.each(outputs)  # [M]
            count = torch.tensor(float(len(losses)), device=losses.device)
            if dist.is_available() and dist.is_initialized():
                dist.all_reduce(count)
                count = count / dist.get_world_size()
            loss = losses.sum() / (count + TINY)
        return loss, {self.word: loss.detach(), "masks": count}


@dataclass(frozen=True, kw_only=True)
class MaskBCEConfig(ObjectiveConfig):
    """Binary cross-entropy of masks; weight 2 (LISA, section 3.2)."""

    weight: float = 2.0

    def build(self) -> MaskBCE:
        return MaskBCE()


class MaskBCE(MaskObjective):
    """See ``zoo_grounding.losses.bce_of``."""

    word = "bce"

    def each(self, outputs: Mapping[str, Tensor]) -> Tensor:
        return bce_of(outputs["mask_logits"], outputs["mask_targets"], outputs["mask_shown"])


@dataclass(frozen=True, kw_only=True)
class MaskDiceConfig(ObjectiveConfig):
    """Dice loss of masks; weight 0.5 (LISA, section 3.2)."""

    weight: float = 0.5

    def build(self) -> MaskDice:
        return MaskDice()


class MaskDice(MaskObjective):
    """See ``zoo_grounding.losses.dice_of``."""

    word = "dice"

    def each(self, outputs: Mapping[str, Tensor]) -> Tensor:
        return dice_of(outputs["mask_logits"], outputs["mask_targets"], outputs["mask_shown"])
