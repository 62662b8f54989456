"""Pixel shuffle: neighbouring patches folded into channels, so that fewer and wider tokens reach the decoder."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Self

from torch import Tensor, nn

from zoo.connectors.base import Connector, ConnectorConfig
from zoo.connectors.simple import mlp, side_for
from zoo.errors import ConfigError
from zoo.part import Features


def fold(tokens: Tensor, grid: tuple[int, int], factor: int) -> Tensor:
    """Fold r x r neighbours into channels: [B, h*w, C] -> [B, h/r * w/r, r*r*C].

    The channels of a folded token are those of its upper left patch, then along the row, then the rows below (the
    order of SmolVLM and Idefics3, arXiv 2504.05299).
    """
    batch, _, channels = tokens.shape
    height, width = grid[0] // factor, grid[1] // factor
    x = tokens.view(batch, height, factor, width, factor, channels)
    x = x.permute(0, 1, 3, 2, 4, 5)  # [B, h/r, w/r, r, r, C]
    return x.reshape(batch, height * width, factor * factor * channels)


class PixelShuffle(Connector):
    """``proj(norm(fold(grid tokens)))``; tokens in front of the grid (the class token) are dropped."""

    def __init__(self, in_width: int, out_width: int, tokens: int, config: PixelShuffleConfig) -> None:
        super().__init__()
        self.factor = factor = config.factor
        self.width = out_width
        self.tokens = tokens
        folded = in_width * factor * factor
        self.norm = nn.LayerNorm(folded)
        self.proj = mlp([folded, *[config.hidden or out_width] * (config.layers - 1), out_width])

    def forward(self, features: Features, text: Features | None = None) -> Features:
        if features.grid is None:
            raise ConfigError(
                "connector 'pixel-shuffle' needs a grid of patches, and this encoder gives none: choose mlp"
            )
        if features.mask is not None:
            raise ConfigError("connector 'pixel-shuffle' folds whole grids and cannot leave tokens out: choose mlp")
        height, width = features.grid
        if height % self.factor or width % self.factor:
            raise ConfigError(
                f"connector 'pixel-shuffle' cannot fold a {height} x {width} grid by {self.factor}:"
                " choose a factor that divides both sides"
            )
        tokens = features.tokens[:, -height * width :]  # [B, h*w, C]
        tokens = self.proj(self.norm(fold(tokens, features.grid, self.factor)))  # [B, h/r * w/r, D_out]
        return Features(tokens, grid=(height // self.factor, width // self.factor))


@dataclass(frozen=True, kw_only=True)
class PixelShuffleConfig(ConnectorConfig):
    """Pixel shuffle, LayerNorm, MLP (InternVL 1.5, arXiv 2404.16821, section 3.1; its grid order is that of SmolVLM).

    Attributes:
        factor: Patches folded along each side.
        layers: Linears of the MLP.
        hidden: Width between them; 0 = the decoder's, as published.
    """

    later_fields: ClassVar[frozenset[str]] = frozenset({"hidden"})
    sized_by: ClassVar[str] = "hidden"

    factor: int = 2
    layers: int = 2
    hidden: int = 0

    def __post_init__(self) -> None:
        if self.factor < 1 or self.layers < 1 or self.hidden < 0:
            raise ValueError(
                f"factor = {self.factor} and layers = {self.layers} must be 1 or more, hidden = {self.hidden} 0 or more"
            )

    def with_tokens(self, tokens: int, in_tokens: int) -> Self:
        return replace(self, factor=side_for(tokens, in_tokens))

    def build(self, *, in_width: int, in_tokens: int, out_width: int) -> PixelShuffle:
        """Raises ConfigError where no square grid of ``in_tokens`` patches (with or without a class token) can be
        folded."""
        sides = [math.isqrt(n) for n in (in_tokens, in_tokens - 1) if n > 0 and math.isqrt(n) ** 2 == n]
        side = next((s for s in sides if s % self.factor == 0), None)
        if side is None:
            raise ConfigError(
                f"connector 'pixel-shuffle' cannot fold {in_tokens} tokens by {self.factor}:"
                " expected a square grid with sides that the factor divides"
            )
        tokens = (side // self.factor) ** 2
        return PixelShuffle(in_width, out_width, tokens, self)
