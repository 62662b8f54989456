"""Mean squared error of what is predicted of noisy images, each image weighing the same or by its noise level."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from zoo.diffusion.noising import DDPM, Flow, Process
from zoo.errors import ConfigError
from zoo.objectives.base import Objective, full_precision, over_ranks
from zoo.objectives.momentum import Momentum
from zoo.recipe import ObjectiveConfig


@dataclass(frozen=True, kw_only=True)
class _DenoisingConfig(ObjectiveConfig):
    """What both objectives share.

    Attributes:
        weight: lambda, the factor of this loss beside the text's (5 in arXiv 2408.11039, section 4.1).
        noise_limit: Largest share of the noise levels for an image that stands before its caption (section 4.3.4: t at
            most 500 of 1,000); 1 = no limit.
    """

    learns: ClassVar[str] = ""

    weight: float = 5.0
    noise_limit: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.noise_limit <= 1:
            raise ValueError(f"noise_limit = {self.noise_limit} must lie in (0, 1]")

    def process(self) -> Process:
        raise TypeError(f"{type(self).__name__} defines no process")

    @property
    def snr_limit(self) -> float:
        """Largest signal-to-noise ratio that counts (``min_snr``); 0 = images weigh the same."""
        return 0.0

    def build(self) -> Denoising:
        return Denoising(self)


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig(_DenoisingConfig):
    """DDPM: predict the noise that was added.

    Attributes:
        schedule: ``squaredcos_cap_v2`` (cosine), ``linear`` or ``scaled_linear``.
        prediction: ``epsilon``, ``v_prediction`` or ``sample``.
        min_snr: gamma of min-SNR weighting (arXiv 2303.09556; 5 there): an image weighs as its
            signal-to-noise ratio would in a loss of x_0, up to gamma. 0 = images weigh the same.
        zero_snr: The last noise level is noise alone (arXiv 2305.08891); ``v_prediction`` or ``sample``.
    """

    learns: ClassVar[str] = "diffusion"
    later_fields: ClassVar[frozenset[str]] = frozenset({"min_snr", "zero_snr"})

    schedule: str = "squaredcos_cap_v2"
    prediction: str = "epsilon"
    min_snr: float = 0.0
    zero_snr: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.process()
        if self.min_snr < 0:
            raise ValueError(f"min_snr = {self.min_snr} must be 0 (images weigh the same) or more")

    def process(self) -> DDPM:
        return DDPM(self.schedule, self.prediction, self.zero_snr)

    @property
    def snr_limit(self) -> float:
        return self.min_snr


@dataclass(frozen=True, kw_only=True)
class FlowConfig(_DenoisingConfig):
    """Flow matching: predict the velocity of the straight path from noise to image."""

    learns: ClassVar[str] = "flow"

    def process(self) -> Process:
        return Flow()


class Denoising(Objective):
    """The error's mean over the elements of an image, then over images: one of 64 patches weighs as one of 256.

    It tells the model, when they are joined, which process makes its images noisy, and is thereby the one switch
    between diffusion and flow in training and in sampling.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"prediction", "denoising_target", "noised"})

    def __init__(self, config: _DenoisingConfig) -> None:
        super().__init__()
        self.config, self.process = config, config.process()
        self.learns = config.learns  # type: ignore[misc]
        if config.snr_limit:
            self.needs = self.needs | {"level"}  # type: ignore[misc]

    def prepare(self, model: Any, momentum: Momentum | None) -> None:
        """Give the model the process.

        Raises:
            ConfigError: Another objective has given it one.
        """
        super().prepare(model, momentum)
        other = model.__dict__.get("_process_of")
        if other is not None and other is not self:
            raise ConfigError("diffusion and flow make images noisy in two ways: choose one of the objectives")
        model.__dict__["_process_of"] = self
        model.set_process(self.process, self.config.noise_limit)

    def forward(
        self, model: Any, batch: Mapping[str, Tensor], outputs: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of ``prediction`` [N, C, h, w] against ``denoising_target``, over the images that are ``noised`` [N],
        weighed by their noise ``level`` [N] where ``min_snr`` is set.

        Reports ``error`` (the loss before its weight) and ``noised`` (how many images). A batch without any gives a
        zero that is connected to the graph. With several processes each divides by the mean number of images a process.
        """
        prediction, noised = outputs["prediction"], outputs["noised"]
        with full_precision(prediction):
            error = image_errors(prediction, outputs["denoising_target"])  # [N]
            if self.config.snr_limit:
                error = error * self._weights(outputs["level"])
            count, share = over_ranks(noised.sum())
            loss = torch.where(noised, error, 0.0).sum() / share
        return loss, {"error": loss.detach(), "noised": count}

    def _weights(self, level: Tensor) -> Tensor:
        assert isinstance(self.process, DDPM)
        return snr_weights(self.process.snr(level), self.config.snr_limit, self.process.prediction)


def snr_weights(snr: Tensor, limit: float, prediction: str) -> Tensor:
    """min-SNR weights [N] of squared errors at signal-to-noise ratios [N] (arXiv 2303.09556).

    min(snr, limit) weighs an error of x_0; that of the noise is ``snr`` times as large, that of v ``snr + 1`` times.

    Args:
        limit: gamma.
        prediction: ``epsilon``, ``v_prediction`` or ``sample``.
    """
    if prediction == "epsilon":
        return (limit / snr).clamp(max=1)  # 1 also where no signal is left
    least = snr.clamp(max=limit)
    return least if prediction == "sample" else least / (snr + 1)


def image_errors(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error [N] of each image, [N, ...] in any shape."""
    return (prediction.float() - target.float()).square().flatten(1).mean(1)
