"""Latent diffusion that reads a text and the embedding of an image: what draws the frames that a motion predictor
predicts (arXiv 2405.01434, section 3.2: the embedding stands among the text's tokens as keys and values, [T; P])."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.denoisers.base import DenoiserConfig
from zoo.draws import rand
from zoo.encoders.base import Encoder, ImageEncoderConfig, TextEncoderConfig
from zoo.errors import ConfigError
from zoo.models.latent_diffusion import LatentDiffusion, LatentDiffusionConfig
from zoo.part import Features, PartConfig, seeded
from zoo.tokenizers.base import BaseTokenizerConfig
from zoo_stories.consistency import Consistency
from zoo_stories.drawing import denoised


@dataclass(frozen=True, kw_only=True)
class FrameDiffusionConfig(LatentDiffusionConfig):
    """The wiring ``latent-diffusion`` and a frozen image encoder, whose vector of an image is one more token.

    Attributes:
        image_drop: Share of the training samples that see no image, so that it can be drawn from a text alone too.
    """

    slots: ClassVar[tuple[str, ...]] = ("encoder", *LatentDiffusionConfig.slots)
    per_stage: ClassVar[frozenset[str]] = LatentDiffusionConfig.per_stage | {"image_drop"}

    image_drop: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.image_drop < 1:
            raise ValueError(f"image_drop = {self.image_drop} must lie in [0, 1)")

    def build(self, parts: Mapping[str, tuple[str, PartConfig]], seed: int) -> FrameDiffusion:
        """Build the model; every part is drawn from its own stream of ``seed``.

        Raises:
            ConfigError: Parts that do not fit each other.
        """
        return FrameDiffusion(
            self,
            cast("ImageEncoderConfig", parts["encoder"][1]),
            cast("TextEncoderConfig", parts["text_encoder"][1]),
            cast("DenoiserConfig", parts["denoiser"][1]),
            cast("BaseTokenizerConfig", parts["image_tokenizer"][1]),
            seed,
        )


class ImageToken(nn.Module):
    """A token [N, D] of an image's vector [N, E]; ``nothing`` stands for an image that is not given."""

    def __init__(self, embed: int, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(embed, width)
        self.nothing = nn.Parameter(0.02 * torch.randn(width))

    def forward(self, vectors: Tensor, hidden: Tensor) -> Tensor:
        """The tokens of ``vectors``, of which the rows ``hidden`` [N] bool are not given."""
        token = self.linear(vectors.to(self.linear.weight.dtype))
        return torch.where(hidden[:, None], self.nothing, token)


class FrameDiffusion(LatentDiffusion):
    """Latent diffusion with an ``encoder``, which never learns here, and ``image_token``, which makes a token of its
    vector."""

    reads_image_codes: ClassVar[bool] = False  # the encoder needs pixels
    config: FrameDiffusionConfig

    def __init__(
        self,
        config: FrameDiffusionConfig,
        encoder_config: ImageEncoderConfig,
        text_config: TextEncoderConfig,
        denoiser_config: DenoiserConfig,
        image_config: BaseTokenizerConfig,
        seed: int,
    ) -> None:
        super().__init__(config, text_config, denoiser_config, image_config, seed)
        self.encoder_config = encoder_config
        with seeded(seed, "encoder"):
            self.encoder: Encoder = encoder_config.build()
        if not self.encoder.pooled_width:
            raise ConfigError("the encoder gives an image no vector to draw from: set encoder.pool=true")
        with seeded(seed, "image_token"):
            self.image_token = ImageToken(self.encoder.pooled_width, self.text_encoder.width)

    def condition(self, batch: Mapping[str, Tensor], dropped: Tensor | None = None) -> Features:
        """The text's tokens and one of the image behind them, [B, S + 1, D].

        The image is ``image_embeds`` [B, D] where a batch has them, or else that of its ``pixel_values``; none where it
        has neither, or in the rows that ``no_image_draw`` [B] in [0, 1) settles (drawn in training). The rows
        ``dropped`` [B] see neither image nor text.
        """
        text = super().condition(batch, dropped)
        vectors = batch.get("image_embeds")
        if vectors is None and "pixel_values" in batch:
            vectors = self.image_vectors(batch["pixel_values"])
        count = len(text.tokens)
        hidden = torch.zeros(count, dtype=torch.bool, device=text.tokens.device)
        if vectors is None:
            vectors, hidden = text.tokens.new_zeros(count, self.encoder.pooled_width), ~hidden
        draw = batch.get("no_image_draw")
        if draw is None and self.training and not text.tokens.is_meta:
            draw = rand((count,), text.tokens.device)
        if draw is not None:
            hidden = hidden | (draw < self.config.image_drop)
        if dropped is not None:
            hidden = hidden | dropped
        return self._with_image(text, vectors, hidden)

    def no_condition(self) -> Features:
        """The empty text's tokens and no image, [1, S + 1, D]."""
        text = super().no_condition()
        nothing = torch.ones(1, dtype=torch.bool, device=text.tokens.device)
        return self._with_image(text, text.tokens.new_zeros(1, self.encoder.pooled_width), nothing)

    def _with_image(self, text: Features, vectors: Tensor, hidden: Tensor) -> Features:
        token = self.image_token(vectors, hidden)[:, None]  # [B, 1, D]
        mask = None if text.mask is None else F.pad(text.mask.bool(), (0, 1), value=True)
        return Features(torch.cat([text.tokens, token.to(text.tokens.dtype)], 1), mask, text.pooled)

    def image_vectors(self, pixel_values: Tensor) -> Tensor:
        """Embeddings [N, D] of unit length of images as the image tokenizer reads them, [N, 3, H, W]; no gradient."""
        side = self.encoder_config.image_size
        with torch.no_grad():
            shown = self.image_config.shown(pixel_values)
            if shown.shape[-1] != side:
                shown = F.interpolate(shown, (side, side), mode="bilinear", antialias=True, align_corners=False)
            mean, std = (
                torch.tensor(values, device=shown.device).view(3, 1, 1)
                for values in (self.encoder_config.mean, self.encoder_config.std)
            )
            weight = next(self.encoder.parameters())
            return F.normalize(self.encoder(((shown - mean) / std).to(weight.dtype)).pooled, dim=-1)

    def draw_embeddings(
        self,
        texts: Sequence[str],
        embeds: Tensor,
        *,
        seed: int = 0,
        steps: int | None = None,
        guidance: float | None = None,
        sampler: str | None = None,
    ) -> Tensor:
        """Draw one image a text and embedding [N, D]: [N, 3, H, W] float32 in [0, 1].

        All noise is that of image 0 of ``seed``, so that neighbours differ by their embedding alone.

        Raises:
            ConfigError: Another number of embeddings, or of another width.
        """
        if embeds.shape != (len(texts), self.encoder.pooled_width):
            raise ConfigError(
                f"embeddings of shape {list(embeds.shape)} for {len(texts)} texts: expected [{len(texts)},"
                f" {self.encoder.pooled_width}], of the motion predictor's encoder"
            )
        rows: dict[str, Any] = {**self.prompt_rows(texts), "image_embeds": F.normalize(embeds, dim=-1)}

        def condition(at: list[int]) -> Features:
            return self.condition({name: value[at].to(self.device) for name, value in rows.items()})

        return denoised(
            self, condition, [frozenset()] * len(texts), Consistency(rate=0.0), seed=seed, steps=steps,
            guidance=guidance, sampler=sampler, streams_of=[0] * len(texts),
        )  # fmt: skip

    def parts(self) -> dict[str, nn.Module]:
        order = ("encoder", "text_encoder", "image_token", "denoiser", "image_tokenizer")
        return {name: getattr(self, name) for name in order}
