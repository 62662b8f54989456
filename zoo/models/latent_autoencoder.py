"""A continuous image tokenizer alone, trained to draw the image from its latents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from zoo.models.autoencoder import AutoencoderConfig, Drawing
from zoo.tokenizers.base import LatentTokenizer, LatentTokenizerConfig

if TYPE_CHECKING:
    from zoo.capabilities import ImageLike


class LatentAutoencoder(Drawing):
    """``image_tokenizer``: pixels to latents and back."""

    provides: ClassVar[frozenset[str]] = frozenset({"reconstruction", "latent_mean", "latent_logvar"})
    image_tokenizer: LatentTokenizer

    def __init__(self, config: AutoencoderConfig, image_config: LatentTokenizerConfig, seed: int) -> None:
        super().__init__(config, image_config, seed)

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Encode and draw ``pixel_values`` [B, 3, H, W]; in training mode from latents drawn from the Gaussian.

        Returns:
            ``reconstruction`` [B, 3, H, W], and the Gaussian's ``latent_mean`` and ``latent_logvar`` [B, C, h, w],
            unscaled.
        """
        tokenizer: Any = self.image_tokenizer
        image, posterior = tokenizer(batch["pixel_values"])
        return {"reconstruction": image, "latent_mean": posterior.mean, "latent_logvar": posterior.logvar}

    def image_latents(self, images: Sequence[ImageLike]) -> Tensor:
        """The mean latents of images at unit variance: [N, C, h, w] float32, on the model's device."""
        shape = (self.image_tokenizer.channels, *self.image_config.grid)
        return self._chunked(images, self.image_tokenizer.encode, shape)
