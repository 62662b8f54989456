"""Latent diffusion that says of itself how the frames of its stories read each other: rates, layers and windows are
then choices of a recipe, which runs and claims compare."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, cast

from zoo.denoisers.base import DenoiserConfig
from zoo.encoders.base import TextEncoderConfig
from zoo.errors import ConfigError
from zoo.models.latent_diffusion import LatentDiffusion, LatentDiffusionConfig
from zoo.part import PartConfig
from zoo.tokenizers.base import BaseTokenizerConfig
from zoo_stories.consistency import Consistency


@dataclass(frozen=True, kw_only=True)
class StoryDiffusionConfig(LatentDiffusionConfig):
    """The wiring ``latent-diffusion`` and fields of ``zoo_stories.Consistency``, which change no weight and no image
    that is drawn alone.

    Attributes:
        rate, layers, start_step, sampling, window, stride, long: As there.
    """

    per_stage: ClassVar[frozenset[str]] = LatentDiffusionConfig.per_stage | {
        "rate", "layers", "start_step", "sampling", "window", "stride", "long",
    }  # fmt: skip

    rate: float = 0.5
    layers: str = "auto"
    start_step: int = 1
    sampling: str = "random"
    window: int = 0
    stride: int = 1
    long: str = "passes"

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            self.consistency()
        except ConfigError as error:
            raise ValueError(str(error)) from None

    def consistency(self) -> Consistency:
        """How the frames of a story read each other; raises ConfigError for a value that is none."""
        return Consistency(
            rate=self.rate,
            layers=self.layers,
            start_step=self.start_step,
            sampling=self.sampling,
            window=self.window,
            stride=self.stride,
            long=self.long,
        )

    def build(self, parts: Mapping[str, tuple[str, PartConfig]], seed: int) -> StoryDiffusion:
        """Build the model; every part is drawn from its own stream of ``seed``.

        Raises:
            ConfigError: Parts that do not fit each other.
        """
        return StoryDiffusion(
            self,
            cast("TextEncoderConfig", parts["text_encoder"][1]),
            cast("DenoiserConfig", parts["denoiser"][1]),
            cast("BaseTokenizerConfig", parts["image_tokenizer"][1]),
            seed,
        )


class StoryDiffusion(LatentDiffusion):
    """Latent diffusion whose ``consistency`` stories are drawn with where nobody says otherwise."""

    config: StoryDiffusionConfig

    @property
    def consistency(self) -> Consistency:
        return self.config.consistency()
