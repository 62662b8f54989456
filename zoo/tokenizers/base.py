"""What an image tokenizer is: an image in, one code (or one latent vector) a patch out, and back again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from zoo.draws import randn
from zoo.errors import ConfigError
from zoo.part import PartConfig

HALF = [0.5, 0.5, 0.5]


class BaseTokenizer(nn.Module):
    """What discrete and continuous image tokenizers share.

    Attributes:
        grid: Height and width of the grid of codes or latents at the configured image size.
        discrete: It makes codes (``ImageTokenizer``) and not latents (``LatentTokenizer``).
        stored: The codes are looked up by the sample's id and not computed from pixels.
    """

    grid: tuple[int, int]
    discrete: ClassVar[bool]
    stored: bool = False

    @property
    def last_layer(self) -> nn.Parameter:
        """Weight of the layer that draws the pixels, where an adversarial loss is weighed against the others.

        Raises:
            ConfigError: It has no decoder that ends in a convolution.
        """
        decoder = getattr(self, "decoder", None)
        convolutions = [m for m in decoder.modules() if isinstance(m, nn.Conv2d)] if decoder is not None else []
        if not convolutions:
            raise ConfigError(f"{type(self).__name__} does not say which layer draws its pixels (last_layer)")
        return convolutions[-1].weight  # type: ignore[return-value]


class ImageTokenizer(BaseTokenizer):
    """Base of discrete image tokenizers.

    Attributes:
        codes: Number of codes K.
    """

    discrete = True
    codes: int

    def encode(self, pixel_values: Tensor) -> Tensor:
        """The code of every patch, in row order: [B, 3, H, W] to [B, h*w] int64 in [0, K). Never has a gradient."""
        raise ConfigError(f"{type(self).__name__} computes no codes from pixels")

    def decode(self, codes: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Draw the images of codes: [B, h*w] int64 to [B, 3, H, W], in the input's normalisation.

        Args:
            grid: Height and width of the code grid where it is not the configured one.
        """
        raise ConfigError(f"{type(self).__name__} cannot draw the images of codes")

    def lookup(self, ids: Sequence[str]) -> Tensor:
        """The stored codes of samples, [N, h*w] int64; only where ``stored``."""
        raise ConfigError(f"{type(self).__name__} stores no codes")


class LatentTokenizer(BaseTokenizer):
    """Base of continuous image tokenizers: a diagonal Gaussian over latents for an image.

    What leaves ``encode`` and ``statistics`` is shifted and scaled to mean 0 and variance 1, once, and ``decode``
    undoes that, once.

    Attributes:
        channels: Channels C of a latent.
    """

    discrete = False
    channels: int

    def statistics(self, pixel_values: Tensor) -> Tensor:
        """Mean and standard deviation of the scaled latents: [B, 3, H, W] to [B, 2C, h, w], the means first. Never has
        a gradient.
        """
        raise TypeError(f"{type(self).__name__} defines no statistics")

    def encode(self, pixel_values: Tensor, sample: bool = False, generator: torch.Generator | None = None) -> Tensor:
        """The scaled latents of [B, 3, H, W]: [B, C, h, w]. Never has a gradient.

        Args:
            sample: Draw from the Gaussian, as in training; else its mean.
            generator: Where a draw's noise comes from; None = the global stream, which a run seeds by step.
        """
        return self.drawn(self.statistics(pixel_values), sample, generator)

    @staticmethod
    def drawn(statistics: Tensor, sample: bool = False, generator: torch.Generator | None = None) -> Tensor:
        """The latents [B, C, h, w] of ``statistics``' [B, 2C, h, w], as ``encode`` returns them."""
        mean, std = statistics.chunk(2, 1)
        if not sample:
            return mean
        if generator is None:
            return mean + std * randn(mean.shape, mean.device, mean.dtype)
        return mean + std * torch.randn(mean.shape, generator=generator, dtype=mean.dtype, device=mean.device)

    def decode(self, latents: Tensor) -> Tensor:
        """Draw the images of scaled latents: [B, C, h, w] to [B, 3, H, W], in the input's normalisation."""
        raise TypeError(f"{type(self).__name__} defines no decode")


@dataclass(frozen=True, kw_only=True)
class BaseTokenizerConfig(PartConfig):
    """Fields every image tokenizer has.

    Attributes:
        image_size: Side of the square input, pixels.
        patch_size: Side of the square one code or latent stands for, pixels.
        mean: Per-channel mean of the input normalisation, of values in [0, 1].
        std: Per-channel standard deviation.
        resize: ``crop`` (short side, then centre), ``squash`` (exact square) or ``pad``.
    """

    image_size: int = 224
    patch_size: int = 16
    mean: list[float] = field(default_factory=lambda: list(HALF))
    std: list[float] = field(default_factory=lambda: list(HALF))
    resize: str = "crop"

    def __post_init__(self) -> None:
        if self.patch_size < 1 or self.image_size % self.patch_size:
            raise ValueError(f"image_size = {self.image_size} must be a multiple of patch_size = {self.patch_size}")
        if self.resize not in ("crop", "squash", "pad"):
            raise ValueError(f"resize = {self.resize!r} must be crop, squash or pad")

    @property
    def grid(self) -> tuple[int, int]:
        """Height and width of the grid of codes or latents."""
        side = self.image_size // self.patch_size
        return side, side

    def shown(self, pixels: Tensor) -> Tensor:
        """What a tokenizer draws, or is shown, [..., 3, H, W] in its normalisation, as float32 in [0, 1]."""
        mean, std = (pixels.new_tensor(v).view(3, 1, 1) for v in (self.mean, self.std))
        return (pixels * std + mean).clamp(0, 1).float()

    def build(self) -> BaseTokenizer:
        raise TypeError(f"{type(self).__name__} defines no build")


@dataclass(frozen=True, kw_only=True)
class ImageTokenizerConfig(BaseTokenizerConfig):
    """Fields every discrete image tokenizer has.

    Attributes:
        vocab_size: Number of codes: the visual vocabulary.
    """

    vocab_size: int = 8192

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.vocab_size < 2:
            raise ValueError(f"vocab_size = {self.vocab_size} must be 2 or more")

    def build(self) -> ImageTokenizer:
        raise TypeError(f"{type(self).__name__} defines no build")


@dataclass(frozen=True, kw_only=True)
class LatentTokenizerConfig(BaseTokenizerConfig):
    """Fields every continuous image tokenizer has.

    Attributes:
        channels: Channels of a latent.
    """

    image_size: int = 256
    patch_size: int = 8
    channels: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.channels < 1:
            raise ValueError(f"channels = {self.channels} must be 1 or more")

    def build(self) -> LatentTokenizer:
        raise TypeError(f"{type(self).__name__} defines no build")
