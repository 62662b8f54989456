"""What trains an image tokenizer: draw the image again, and, where it has codes, what its quantizer needs."""

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
    """Squared and absolute error of the pixels, and four terms of the quantizer, each with a factor that may be 0.

    Attributes:
        absolute: Share of the absolute error in the pixel loss; the rest is squared error.
        beta: Factor of the commitment of the vectors to their codes (1 in BEiT v2's quantizer; arXiv 1711.00937,
            equation 3; 0.25 in LlamaGen and Open-MAGVIT2).
        codebook: Factor of the distance of the codes to their vectors, which trains a codebook that learns by gradient
            (1 in LlamaGen; 0.25 in Chameleon, whose VQGAN swaps the two factors).
        entropy: Factor of the entropy of each vector's code, less ``diversity`` times that of the batch's codes
            (arXiv 2310.05737, section 3.1; 0.1 in Open-MAGVIT2).
        diversity: See ``entropy``.
        temperature: tau of the distribution over codes.
        entropy_over: ``codes``, all of them; ``bits``: each bit alone, meaned (Show-o's class, at temperature 1).
        floor: How the logarithm of a code's share is kept finite: ``add`` or ``clamp`` (``zoo.tokenizers.entropy``).
    """

    absolute: float = 0.5
    beta: float = 1.0
    codebook: float = 0.0
    entropy: float = 0.0
    diversity: float = 1.0
    temperature: float = 0.01
    entropy_over: str = "codes"
    floor: str = "add"

    def __post_init__(self) -> None:
        if min(self.beta, self.codebook, self.entropy, self.diversity) < 0 or not 0 <= self.absolute <= 1:
            raise ValueError(
                "beta, codebook, entropy and diversity must not be negative and absolute must lie in [0, 1]"
            )
        if self.temperature <= 0:
            raise ValueError(f"temperature = {self.temperature} must be above 0")
        if self.entropy_over not in ("codes", "bits") or self.floor not in ("add", "clamp"):
            raise ValueError("entropy_over must be codes or bits, floor must be add or clamp")

    def build(self) -> VQReconstruction:
        return VQReconstruction(self)


class VQReconstruction(Objective):
    """Mean pixel error of ``reconstruction`` against the batch's ``pixel_values``, and the quantizer's terms.

    A term whose factor is 0 is not computed, and the outputs it reads need not be there: with ``beta`` = 0 it trains
    tokenizers without codes. What a codebook of moving averages learns from is no loss.
    """

    learns: ClassVar[str] = "reconstruction"

    def __init__(self, config: VQReconstructionConfig) -> None:
        super().__init__()
        self.config = config

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """The outputs that its terms read."""
        c = self.config
        terms = {"commitment": c.beta, "codebook_loss": c.codebook, "latents": c.entropy}
        return frozenset({"reconstruction", *(name for name, factor in terms.items() if factor)})

    def forward(
        self, model: Any, batch: Mapping[str, Tensor], outputs: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss.

        Reports ``psnr`` (dB, over the batch, of values in [0, 1]); where there are codes ``codes_used`` (different
        codes in the batch) and ``perplexity`` of their distribution; and the terms before their factors.
        """
        c, report = self.config, dict[str, Tensor]()
        with full_precision(outputs["reconstruction"]):
            wanted, drawn = batch["pixel_values"].float(), outputs["reconstruction"].float()
            squared = (drawn - wanted).square().mean()
            loss = c.absolute * (drawn - wanted).abs().mean() + (1 - c.absolute) * squared
            for name, factor in (("commitment", c.beta), ("codebook_loss", c.codebook)):
                if factor:
                    loss = loss + factor * outputs[name].float()
            if c.beta:
                report["commitment"] = outputs["commitment"]
            if c.entropy:
                found = model.image_tokenizer.entropies(outputs["latents"], c.temperature, c.entropy_over, c.floor)
                loss = loss + c.entropy * (found.sample - c.diversity * found.batch)
                report |= {"sample_entropy": found.sample, "batch_entropy": found.batch}
        with torch.no_grad():
            std = wanted.new_tensor(model.image_config.std).square().mean()
            report["psnr"] = -10 / math.log(10) * (squared * std).clamp(min=1e-10).log()
            if "codes" in outputs and not wanted.is_meta:
                share = torch.bincount(outputs["codes"].flatten()).float()
                share = share / share.sum()
                report["codes_used"] = (share > 0).sum()
                report["perplexity"] = torch.special.entr(share).sum().exp()
        return loss, {key: value.detach() for key, value in report.items()}
