"""What trains a VQ tokenizer: draw the image again, and stay near the codes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from zoo.objectives.base import Objective, full_precision
from zoo.recipe import ObjectiveConfig


@dataclass(frozen=True, kw_only=True)
class VQReconstructionConfig(ObjectiveConfig):
    """Squared and absolute error of the pixels, and the commitment of the vectors to their codes.

    Attributes:
        beta: Factor of the commitment (1 in BEiT v2's quantizer; arXiv 1711.00937, equation 3).
        absolute: Share of the absolute error in the pixel loss; the rest is squared error.
    """

    beta: float = 1.0
    absolute: float = 0.5

    def __post_init__(self) -> None:
        if self.beta < 0 or not 0 <= self.absolute <= 1:
            raise ValueError("beta must not be negative and absolute must lie in [0, 1]")

    def build(self) -> VQReconstruction:
        return VQReconstruction(self)


class VQReconstruction(Objective):
    """Mean pixel error of ``reconstruction`` against the batch's ``pixel_values``, plus ``beta`` x ``commitment``.

    The codebook itself has no loss: it follows by moving averages.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"reconstruction", "commitment", "codes"})

    def __init__(self, config: VQReconstructionConfig) -> None:
        super().__init__()
        self.beta, self.absolute = config.beta, config.absolute

    def forward(
        self, model: Any, batch: Mapping[str, Tensor], outputs: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss.

        Reports ``psnr`` (dB, over the batch, of values in [0, 1]), ``codes_used`` (different codes in the batch) and
        ``perplexity`` of their distribution.
        """
        with full_precision(outputs["reconstruction"]):
            wanted, drawn = batch["pixel_values"].float(), outputs["reconstruction"].float()
            squared = (drawn - wanted).square().mean()
            pixel = self.absolute * (drawn - wanted).abs().mean() + (1 - self.absolute) * squared
            loss = pixel + self.beta * outputs["commitment"].float()
        with torch.no_grad():
            std = wanted.new_tensor(model.image_config.std).square().mean()
            report = {"psnr": -10 / math.log(10) * (squared * std).clamp(min=1e-10).log()}
            if not wanted.is_meta:
                share = torch.bincount(outputs["codes"].flatten()).float()
                share = share / share.sum()
                report["codes_used"] = (share > 0).sum()
                report["perplexity"] = torch.special.entr(share).sum().exp()
        return loss, {key: value.detach() for key, value in report.items()}
