"""What an image tokenizer is: an image in, one code a patch out, and where it can draw, back again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from zoo.errors import ConfigError
from zoo.part import PartConfig

HALF = [0.5, 0.5, 0.5]


class ImageTokenizer(nn.Module):
    """Base of image tokenizers.

    Attributes:
        codes: Number of codes K.
        grid: Height and width of the code grid at the configured image size.
        stored: The codes are looked up by the sample's id and not computed from pixels.
    """

    codes: int
    grid: tuple[int, int]
    stored: bool = False

    def encode(self, pixel_values: Tensor) -> Tensor:
        """The code of every patch, in row order: [B, 3, H, W] to [B, h*w] int64 in [0, K). Never has a gradient."""
        raise ConfigError(f"{type(self).__name__} computes no codes from pixels")

    def decode(self, codes: Tensor) -> Tensor:
        """Draw the images of codes: [B, h*w] int64 to [B, 3, H, W], in the input's normalisation."""
        raise ConfigError(f"{type(self).__name__} cannot draw the images of codes")

    def lookup(self, ids: Sequence[str]) -> Tensor:
        """The stored codes of samples, [N, h*w] int64; only where ``stored``."""
        raise ConfigError(f"{type(self).__name__} stores no codes")


@dataclass(frozen=True, kw_only=True)
class ImageTokenizerConfig(PartConfig):
    """Fields every image tokenizer has.

    Attributes:
        image_size: Side of the square input, pixels.
        patch_size: Side of the square one code stands for, pixels.
        vocab_size: Number of codes: the visual vocabulary.
        mean: Per-channel mean of the input normalisation, of values in [0, 1].
        std: Per-channel standard deviation.
        resize: ``crop`` (short side, then centre), ``squash`` (exact square) or ``pad``.
    """

    image_size: int = 224
    patch_size: int = 16
    vocab_size: int = 8192
    mean: list[float] = field(default_factory=lambda: list(HALF))
    std: list[float] = field(default_factory=lambda: list(HALF))
    resize: str = "crop"

    def __post_init__(self) -> None:
        if self.patch_size < 1 or self.image_size % self.patch_size:
            raise ValueError(f"image_size = {self.image_size} must be a multiple of patch_size = {self.patch_size}")
        if self.vocab_size < 2:
            raise ValueError(f"vocab_size = {self.vocab_size} must be 2 or more")
        if self.resize not in ("crop", "squash", "pad"):
            raise ValueError(f"resize = {self.resize!r} must be crop, squash or pad")

    @property
    def grid(self) -> tuple[int, int]:
        """Height and width of the code grid."""
        side = self.image_size // self.patch_size
        return side, side

    def build(self) -> ImageTokenizer:
        raise TypeError(f"{type(self).__name__} defines no build")
