"""The down and the up half of a U-Net around the trunk (arXiv 2408.11039, section 3, figure 3 b)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.diffusion.times import sinusoid
from zoo.patch_codecs.base import PatchCodec, PatchCodecConfig, Skips


@dataclass(frozen=True, kw_only=True)
class UNetCodecConfig(PatchCodecConfig):
    """Residual convolutions that halve the grid once for every doubling of the patch.

    The paper gives the size, 0.27B parameters beside every trunk, and says that plain layer norms take the place of
    adaptive ones; stem width and number of blocks are chosen here so that patches of 2 come to that size.

    Attributes:
        stem_width: Channels at the latents' own grid; below it they are doubled once.
        blocks: Residual blocks at every grid, each way.
        level_width: Of the sinusoid that tells the noise level.
    """

    stem_width: int = 564
    blocks: int = 3
    level_width: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stem_width < 1 or self.blocks < 1 or self.level_width < 2:
            raise ValueError(
                f"stem_width = {self.stem_width}, blocks = {self.blocks}, level_width = {self.level_width}: expected at"
                " least 1, 1 and 2"
            )

    def build(self, *, channels: int, width: int) -> UNetCodec:
        return UNetCodec(self, channels=channels, width=width)


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of every pixel of [N, C, h, w]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class ResidualBlock(nn.Module):
    """Norm, SiLU, convolution, the noise level added, norm, SiLU, convolution; and the input added."""

    def __init__(self, before: int, after: int, level_width: int) -> None:
        super().__init__()
        self.norm_in = ChannelNorm(before)
        self.conv_in = nn.Conv2d(before, after, 3, padding=1)
        self.level = nn.Linear(level_width, after)
        self.norm_out = ChannelNorm(after)
        self.conv_out = nn.Conv2d(after, after, 3, padding=1)
        self.shortcut = nn.Conv2d(before, after, 1) if before != after else nn.Identity()

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        h = self.conv_in(F.silu(self.norm_in(x)))  # [N, after, h, w]
        h = h + self.level(F.silu(level))[..., None, None]
        out: Tensor = self.shortcut(x) + self.conv_out(F.silu(self.norm_out(h)))
        return out


class UNetCodec(PatchCodec):
    """``down`` to one pixel a patch, ``to_trunk``, ``from_trunk``, ``up`` again, reading what every block of ``down``
    returned."""

    def __init__(self, config: UNetCodecConfig, *, channels: int, width: int) -> None:
        super().__init__(channels=channels, width=width, patch=config.patch)
        self.level_width = config.level_width
        grids = config.patch.bit_length()  # 1, 2, 3, 4 for patches of 1, 2, 4, 8
        widths = [config.stem_width * (1 if i == 0 else 2) for i in range(grids)]
        mixed = 4 * config.stem_width
        self.level = nn.Sequential(nn.Linear(config.level_width, mixed), nn.SiLU(), nn.Linear(mixed, mixed))
        self.conv_in = nn.Conv2d(channels, widths[0], 3, padding=1)
        self.down = nn.ModuleList()
        self.downsample = nn.ModuleList()
        at = widths[0]
        for i, wide in enumerate(widths):
            if i:
                self.downsample.append(nn.Conv2d(at, at, 3, stride=2, padding=1))
            self.down.append(
                nn.ModuleList(ResidualBlock(at if n == 0 else wide, wide, mixed) for n in range(config.blocks))
            )
            at = wide
        self.to_trunk = nn.Linear(at, width)
        self.from_trunk = nn.Linear(width, at)
        self.up = nn.ModuleList()
        self.upsample = nn.ModuleList()
        for i, wide in reversed(list(enumerate(widths))):
            self.up.append(
                nn.ModuleList(ResidualBlock((at if n == 0 else wide) + wide, wide, mixed) for n in range(config.blocks))
            )
            at = wide
            if i:
                self.upsample.append(nn.Conv2d(at, at, 3, padding=1))
        self.norm_out = ChannelNorm(at)
        self.conv_out = nn.Conv2d(at, channels, 3, padding=1)

    def encode(self, latents: Tensor, level: Tensor) -> tuple[Tensor, Skips]:
        time = self._level(level, latents)
        x = self.conv_in(latents)  # [N, W, h, w]
        skips: list[Tensor] = []
        for i, blocks in enumerate(self.down):
            if i:
                x = self.downsample[i - 1](x)
            for block in blocks:  # type: ignore[attr-defined]
                x = block(x, time)
                skips.append(x)
        tokens: Tensor = self.to_trunk(x.flatten(2).transpose(1, 2))  # [N, n, D]
        return tokens, tuple(skips)

    def decode(self, hidden: Tensor, skips: Skips, level: Tensor, grid: tuple[int, int]) -> Tensor:
        time = self._level(level, hidden)
        rows, columns = grid[0] // self.patch, grid[1] // self.patch
        x = self.from_trunk(hidden).transpose(1, 2).unflatten(2, (rows, columns))  # [N, W, h / k, w / k]
        left = list(skips)
        for i, blocks in enumerate(self.up):
            if i:
                x = self.upsample[i - 1](F.interpolate(x, scale_factor=2.0, mode="nearest"))
            for block in blocks:  # type: ignore[attr-defined]
                x = block(torch.cat([x, left.pop()], dim=1), time)
        out: Tensor = self.conv_out(F.silu(self.norm_out(x)))  # [N, C, h, w]
        return out

    def _level(self, level: Tensor, like: Tensor) -> Tensor:
        embedded: Tensor = self.level(sinusoid(level, self.level_width).to(like.dtype))  # [N, 4 W]
        return embedded
