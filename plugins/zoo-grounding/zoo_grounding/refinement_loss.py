"""PixelLM's target refinement loss (arXiv 2312.02228, section 3.3): pixels that several targets of one answer claim
weigh more in the binary cross-entropy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.recipe import ObjectiveConfig
from zoo_grounding.objectives import MaskObjective

FORMS = ("paper", "released")


def claimed_twice(logits: Tensor, question: Tensor) -> Tensor:
    """Pixels that at least two masks of one answer claim (logit above 0): [M, H, W] bool, equal for all its masks.

    Args:
        logits: [M, H, W].
        question: [M] long, the answer that each mask belongs to.
    """
    same = (question[:, None] == question).to(logits.dtype)  # [M, M]
    claims = (logits.detach() > 0).to(logits.dtype)
    return torch.einsum("mn,nhw->mhw", same, claims) > 1.5


@dataclass(frozen=True, kw_only=True)
class MaskRefinementConfig(ObjectiveConfig):
    """Binary cross-entropy weighted by what several targets claim; weight 2 (PixelLM).

    Attributes:
        alpha: Weight of a pixel that at least two masks of its answer claim.
        form: ``paper``: such pixels weigh ``alpha`` and all others 1; it stands in place of ``mask-bce``, which it
            is at alpha = 1. ``released``: they weigh ``alpha`` and all others 0, a further term beside ``mask-bce``;
            the released code has it (with alpha 1), switched off.
    """

    weight: float = 2.0
    alpha: float = 2.0
    form: str = "paper"

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise ValueError(f"form = {self.form!r} must be one of {', '.join(FORMS)}")
        if self.alpha < 0:
            raise ValueError(f"alpha = {self.alpha} must not be negative")

    def build(self) -> MaskRefinement:
        return MaskRefinement(self)


class MaskRefinement(MaskObjective):
    """The mean over an image's pixels of weight times cross-entropy, a mask."""

    word = "refinement"
    needs: ClassVar[frozenset[str]] = frozenset({*MaskObjective.needs, "mask_question"})

    def __init__(self, config: MaskRefinementConfig) -> None:
        super().__init__()
        self.alpha = config.alpha
        self.elsewhere = 1.0 if config.form == "paper" else 0.0

    def each(self, outputs: Mapping[str, Tensor]) -> Tensor:
        logits, shown = outputs["mask_logits"], outputs["mask_shown"]
        weight = torch.where(claimed_twice(logits, outputs["mask_question"]), self.alpha, self.elsewhere)
        cost = F.binary_cross_entropy_with_logits(logits, outputs["mask_targets"], reduction="none")
        return (weight * cost * shown).flatten(1).sum(1) / shown.flatten(1).sum(1).clamp(min=1)
