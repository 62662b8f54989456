"""What a patch codec is: noisy latents in, one vector a patch out, and from the trunk's states back to latents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from zoo.errors import ConfigError
from zoo.part import PartConfig

Skips = tuple[Tensor, ...]
"""What goes around the trunk, from ``encode`` to ``decode``."""

PATCHES = (1, 2, 4, 8)


class PatchCodec(nn.Module):
    """Base of patch codecs.

    Attributes:
        channels: Of the latents, C.
        width: Of the sequence, D.
        patch: Side of a patch in latent pixels.
    """

    def __init__(self, *, channels: int, width: int, patch: int) -> None:
        super().__init__()
        self.channels, self.width, self.patch = channels, width, patch

    def cells(self, grid: tuple[int, int]) -> int:
        """Patches of latents of ``grid`` = (h, w).

        Raises:
            ConfigError: The grid does not divide into patches.
        """
        height, width = grid
        if height % self.patch or width % self.patch:
            raise ConfigError(
                f"latents of {height}x{width} do not divide into patches of {self.patch}x{self.patch}: set"
                " patch_codec.patch to a divisor, or another image_size"
            )
        return (height // self.patch) * (width // self.patch)

    def encode(self, latents: Tensor, level: Tensor) -> tuple[Tensor, Skips]:
        """Patches in row order: latents [N, C, h, w] of noise ``level`` [N] (0 = clean, ``LEVELS`` = noise) to vectors
        [N, n, D], and what ``decode`` reads beside the trunk's states."""
        raise TypeError(f"{type(self).__name__} defines no encode")

    def decode(self, hidden: Tensor, skips: Skips, level: Tensor, grid: tuple[int, int]) -> Tensor:
        """States [N, n, D] of the trunk to a prediction [N, C, h, w] for latents of ``grid`` = (h, w)."""
        raise TypeError(f"{type(self).__name__} defines no decode")


@dataclass(frozen=True, kw_only=True)
class PatchCodecConfig(PartConfig):
    """Fields every patch codec has.

    Attributes:
        patch: Side of a patch in latent pixels: 1, 2, 4 or 8 (arXiv 2408.11039, table 6).
    """

    patch: int = 2

    def __post_init__(self) -> None:
        if self.patch not in PATCHES:
            raise ValueError(f"patch = {self.patch} must be one of {', '.join(map(str, PATCHES))}")

    def build(self, *, channels: int, width: int) -> PatchCodec:
        """Build the codec of latents with ``channels`` channels for a trunk of ``width``."""
        raise TypeError(f"{type(self).__name__} defines no build")


def patchify(latents: Tensor, patch: int) -> Tensor:
    """Cut [N, C, h, w] into patches in row order, [N, (h / patch) (w / patch), patch patch C]: inside a patch row,
    column, channel."""
    count, channels, height, width = latents.shape
    rows, columns = height // patch, width // patch
    x = latents.reshape(count, channels, rows, patch, columns, patch)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(count, rows * columns, patch * patch * channels)


def unpatchify(patches: Tensor, patch: int, grid: Sequence[int]) -> Tensor:
    """Put patches [N, n, patch patch C] back together: [N, C, h, w] for ``grid`` = (h, w), the inverse of
    ``patchify``."""
    height, width = grid
    rows, columns = height // patch, width // patch
    x = patches.reshape(len(patches), rows, columns, patch, patch, -1)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(len(patches), -1, height, width)
