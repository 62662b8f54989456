"""One linear map each way (arXiv 2408.11039, section 3, figure 3 a)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from zoo.diffusion.times import sinusoid
from zoo.patch_codecs.base import PatchCodec, PatchCodecConfig, Skips, patchify, unpatchify


@dataclass(frozen=True, kw_only=True)
class LinearCodecConfig(PatchCodecConfig):
    """A linear map to the trunk's width and one back, less than half a percent of any of the paper's models."""

    def build(self, *, channels: int, width: int) -> LinearCodec:
        return LinearCodec(channels=channels, width=width, patch=self.patch)


class LinearCodec(PatchCodec):
    """``patch_in`` reads a patch to which the embedding of the noise level has been added; ``patch_out`` predicts."""

    def __init__(self, *, channels: int, width: int, patch: int) -> None:
        super().__init__(channels=channels, width=width, patch=patch)
        cells = patch * patch * channels
        self.patch_in = nn.Linear(cells, width)
        self.patch_out = nn.Linear(width, cells)
        for layer in (self.patch_in, self.patch_out):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def encode(self, latents: Tensor, level: Tensor) -> tuple[Tensor, Skips]:
        patches = patchify(latents, self.patch)  # [N, n, k k C]
        time = sinusoid(level, patches.shape[-1])[:, None]  # [N, 1, k k C]
        tokens: Tensor = self.patch_in(patches + time.to(patches.dtype))  # [N, n, D]
        return tokens, ()

    def decode(self, hidden: Tensor, skips: Skips, level: Tensor, grid: tuple[int, int]) -> Tensor:
        return unpatchify(self.patch_out(hidden), self.patch, grid)
