"""What trains a KL autoencoder: draw the image again from latents that stay near a unit Gaussian, loosely."""

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
class KLReconstructionConfig(ObjectiveConfig):
    """Absolute error of the pixels and the divergence of the latents from a unit Gaussian.

    Attributes:
        kl: Factor of the divergence (1e-6 in latent diffusion and in Transfusion).
        absolute: Share of the absolute error in the pixel loss; the rest is squared error.
    """

    kl: float = 1e-6
    absolute: float = 1.0

    def __post_init__(self) -> None:
        if self.kl < 0 or not 0 <= self.absolute <= 1:
            raise ValueError("kl must not be negative and absolute must lie in [0, 1]")

    def build(self) -> KLReconstruction:
        return KLReconstruction(self)


class KLReconstruction(Objective):
    """Latent diffusion's first-stage loss (arXiv 2112.10752, appendix G) without its two networks.

    There the error is summed over an image's pixel values and the divergence over its latents; this is that sum
    divided by the number of pixel values, so that the error is a mean and both keep their ratio.
    """

    learns: ClassVar[str] = "reconstruction"
    needs: ClassVar[frozenset[str]] = frozenset({"reconstruction", "latent_mean", "latent_logvar"})

    def __init__(self, config: KLReconstructionConfig) -> None:
        super().__init__()
        self.kl, self.absolute = config.kl, config.absolute

    def forward(
        self, model: Any, batch: Mapping[str, Tensor], outputs: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss.

        Reports ``psnr`` (dB, over the batch, of values in [0, 1]), ``l1`` (of the normalised pixels), ``kl`` (nats an
        image) and ``latent_std`` (of unscaled draws, over batch and channels).
        """
        with full_precision(outputs["reconstruction"]):
            wanted, drawn = batch["pixel_values"].float(), outputs["reconstruction"].float()
            mean, logvar = outputs["latent_mean"].float(), outputs["latent_logvar"].float()
            error = drawn - wanted
            absolute, squared = error.abs().mean(), error.square().mean()
            divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).flatten(1).sum(1).mean()
            pixel = self.absolute * absolute + (1 - self.absolute) * squared
            loss = pixel + self.kl * divergence / wanted[0].numel()
        with torch.no_grad():
            scale = wanted.new_tensor(model.image_config.std).square().mean()
            variance = mean.var(unbiased=False) + logvar.exp().mean()
            report = {
                "psnr": -10 / math.log(10) * (squared * scale).clamp(min=1e-10).log(),
                "l1": absolute,
                "kl": divergence,
                "latent_std": variance.sqrt(),
            }
        return loss, {key: value.detach() for key, value in report.items()}
