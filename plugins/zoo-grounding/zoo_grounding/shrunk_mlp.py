"""PixelLM's projector to the language model: a smaller grid of patches, then an MLP (llava_arch.py of the release)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.connectors.base import Connector, ConnectorConfig
from zoo.connectors.simple import mlp
from zoo.errors import ConfigError
from zoo.part import Features


@dataclass(frozen=True, kw_only=True)
class ShrunkMLPConfig(ConnectorConfig):
    """The grid of patches made ``factor`` times smaller bilinearly, then Linear, exact GELU, Linear.

    Attributes:
        factor: Patches along the side of a cell (32 x 32 patches become 16 x 16 cells).
        expansion: Width between the linears, in widths of the language model.
        blends_hidden: Let padded patches into the cells on the border of the picture, as the release does; otherwise a
            cell is the mean of its real patches.
    """

    factor: int = 2
    expansion: int = 2
    blends_hidden: bool = False

    def __post_init__(self) -> None:
        if min(self.factor, self.expansion) < 1:
            raise ValueError(f"factor = {self.factor} and expansion = {self.expansion} must be 1 or more")

    def build(self, *, in_width: int, in_tokens: int, out_width: int) -> ShrunkMLP:
        """Raises ConfigError where ``in_tokens`` are no square grid that ``factor`` divides."""
        side = math.isqrt(in_tokens)
        if side * side != in_tokens or side % self.factor:
            raise ConfigError(
                f"connector.factor = {self.factor} cannot shrink {in_tokens} tokens: expected a square grid of patches"
                " that it divides, without a class token"
            )
        return ShrunkMLP(self, in_width, side, out_width)


class ShrunkMLP(Connector):
    """``proj`` on the cells; a cell is real where its first patch is."""

    def __init__(self, config: ShrunkMLPConfig, in_width: int, side: int, out_width: int) -> None:
        super().__init__()
        self.config = config
        self.cells = side // config.factor
        self.tokens = self.cells**2
        self.width = out_width
        self.proj = mlp([in_width, config.expansion * out_width, out_width])

    def forward(self, features: Features, text: Features | None = None) -> Features:
        """Map patches [B, h*w, D_in] to cells [B, h*w/factor², D_out] with the mask of the real ones.

        Raises:
            ConfigError: The tokens are no grid.
        """
        if features.grid is None or features.grid[0] * features.grid[1] != features.tokens.shape[1]:
            raise ConfigError(
                "connector shrunk-mlp reads a grid of patches without a class token: set encoder.cls=false"
            )
        size = (self.cells, self.cells)
        patches = _grid(features.tokens.transpose(1, 2), features.grid)  # [B, D, h, w]
        mask = features.mask
        if mask is None:
            small, real = F.interpolate(patches, size, mode="bilinear"), None
        else:
            shown = _grid(mask[:, None], features.grid).to(patches.dtype)  # [B, 1, h, w]
            real = F.interpolate(shown, size, mode="nearest").flatten(1).bool()
            small = self._shrunk(patches, shown, size)
        cells: Tensor = self.proj(small.flatten(2).transpose(1, 2))  # [B, cells, D_out]
        return Features(cells, mask=real, grid=size)

    def _shrunk(self, patches: Tensor, shown: Tensor, size: tuple[int, int]) -> Tensor:
        if self.config.blends_hidden:
            return F.interpolate(patches, size, mode="bilinear")
        weight = F.interpolate(shown, size, mode="bilinear")
        total = F.interpolate(torch.where(shown.bool(), patches, 0.0), size, mode="bilinear")
        return total / weight.clamp(min=torch.finfo(weight.dtype).tiny)


def _grid(rows: Tensor, size: tuple[int, int]) -> Tensor:
    """[B, C, h * w] -> [B, C, h, w]."""
    return rows.reshape(*rows.shape[:2], *size)
