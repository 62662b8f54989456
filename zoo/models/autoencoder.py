"""An image tokenizer alone, trained to draw the image from its codes (or latents: ``latent_autoencoder.py``)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor

from zoo.errors import ConfigError
from zoo.layout import Layout
from zoo.models.base import Model, evaluating
from zoo.part import PartConfig, seeded
from zoo.recipe import WiringConfig
from zoo.tokenizers.base import BaseTokenizer, BaseTokenizerConfig, ImageTokenizer, ImageTokenizerConfig

if TYPE_CHECKING:
    from zoo.capabilities import ImageLike
    from zoo.tokenizers.base import LatentTokenizerConfig
    from zoo.tokenizers.processor import ImageProcessor

CHUNK = 64
"""Images a forward pass of a capability."""


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig(WiringConfig):
    """Trains an image tokenizer.

    Attributes:
        augment: What training images go through (``none``, ``random-resized-crop``, ``shift``, ``flip``,
            ``shift-flip``).
    """

    slots: ClassVar[tuple[str, ...]] = ("image_tokenizer",)

    augment: str = "none"

    def build(self, parts: Mapping[str, tuple[str, PartConfig]], seed: int) -> Drawing:
        """Build the model, the tokenizer from its own stream of ``seed``: an ``Autoencoder``, or for a continuous
        tokenizer a ``LatentAutoencoder``.

        Raises:
            ConfigError: A tokenizer that stores its codes: there is nothing to train.
        """
        image_config = parts["image_tokenizer"][1]
        if isinstance(image_config, ImageTokenizerConfig):
            return Autoencoder(self, image_config, seed)
        from zoo.models.latent_autoencoder import LatentAutoencoder

        return LatentAutoencoder(self, cast("LatentTokenizerConfig", image_config), seed)


class Drawing(Model):
    """``image_tokenizer``: pixels to codes or latents and back; what both kinds share."""

    image_tokenizer: BaseTokenizer

    def __init__(self, config: AutoencoderConfig, image_config: BaseTokenizerConfig, seed: int) -> None:
        super().__init__()
        self.config, self.image_config, self.seed = config, image_config, seed
        self._processor: ImageProcessor | None = None
        with seeded(seed, "image_tokenizer"):
            self.image_tokenizer = image_config.build()

    # -- capabilities ----------------------------------------------------------------------------------------------

    def reconstruct_images(self, images: Sequence[ImageLike]) -> Tensor:
        """What the tokenizer draws from the codes, or the mean latents, of images: [N, 3, H, W] float32 in [0, 1]."""
        tokenizer: Any = self.image_tokenizer

        def draw(pixels: Tensor) -> Tensor:
            return self.image_config.shown(tokenizer.decode(tokenizer.encode(pixels)))

        return self._chunked(images, draw, (3, self.image_config.image_size, self.image_config.image_size))

    def prepared_images(self, images: Sequence[ImageLike]) -> Tensor:
        """The images as the tokenizer is shown them, [N, 3, H, W] in [0, 1]: what a reconstruction is compared with."""
        return self._chunked(
            images, self.image_config.shown, (3, self.image_config.image_size, self.image_config.image_size)
        )

    def _chunked(
        self,
        images: Sequence[ImageLike],
        run: Callable[[Tensor], Tensor],
        shape: tuple[int, ...],
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        if isinstance(images, str):
            raise ConfigError("expected a list of images, got one string: wrap it in a list")
        like = next(self.parameters())
        rows = [torch.empty(0, *shape, dtype=dtype, device=like.device)]
        with evaluating(self):
            for start in range(0, len(images), CHUNK):
                pixels = self.processor.encode_images(images[start : start + CHUNK])
                rows.append(run(pixels.to(like.device, like.dtype)))
            return torch.cat(rows)

    # -- what surrounds the tensors --------------------------------------------------------------------------------

    @property
    def processor(self) -> Any:
        """Turns samples into ``pixel_values``; made on first use."""
        if self._processor is None:
            from zoo.data.images import ImageTransform
            from zoo.tokenizers.processor import ImageProcessor

            image = self.image_config
            transform = ImageTransform(
                size=image.image_size,
                mean=tuple(image.mean),
                std=tuple(image.std),
                mode=cast("Any", image.resize),
                augment=cast("Any", self.config.augment),
            )
            self._processor = ImageProcessor(transform, seed=self.seed)
        return self._processor

    def layouts(self) -> dict[str, Layout]:
        """None: convolutions attend over no sequence."""
        return {}

    def example_batch(self, batch_size: int = 1) -> dict[str, Tensor]:
        """``pixel_values`` of ``batch_size`` images."""
        size = self.image_config.image_size
        like = next(self.parameters())
        return {"pixel_values": torch.zeros(batch_size, 3, size, size, dtype=like.dtype, device=like.device)}


class Autoencoder(Drawing):
    """``image_tokenizer``: pixels to codes and back."""

    provides: ClassVar[frozenset[str]] = frozenset(
        {"reconstruction", "codes", "commitment", "codebook_loss", "latents"}
    )
    image_tokenizer: ImageTokenizer

    def __init__(self, config: AutoencoderConfig, image_config: ImageTokenizerConfig, seed: int) -> None:
        super().__init__(config, image_config, seed)
        if self.image_tokenizer.stored:
            raise ConfigError("the image tokenizer stores its codes and learns nothing: choose image_tokenizer=vq")

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Encode, quantise and draw ``pixel_values`` [B, 3, H, W].

        Returns:
            ``reconstruction`` [B, 3, H, W], ``codes`` [B, h, w], ``latents`` [B, h, w, C] (what was quantised, fp32),
            and the scalars ``commitment`` and ``codebook_loss``.
        """
        return reconstruct(self.image_tokenizer, batch["pixel_values"])

    @property
    def codebook_size(self) -> int:
        """Number of codes K."""
        return self.image_tokenizer.codes

    def image_codes(self, images: Sequence[ImageLike]) -> Tensor:
        """The codes of images in row order: [N, h*w] int64, on the model's device."""
        cells = self.image_config.grid[0] * self.image_config.grid[1]
        return self._chunked(images, self.image_tokenizer.encode, (cells,), torch.long)


def reconstruct(tokenizer: Any, pixel_values: Tensor) -> dict[str, Tensor]:
    """What ``vq-reconstruction`` needs of a tokenizer and an image batch."""
    image, quantized = tokenizer(pixel_values)
    return {
        "reconstruction": image,
        "codes": quantized.codes,
        "latents": quantized.latents,
        "commitment": quantized.commitment,
        "codebook_loss": quantized.codebook_loss,
    }
