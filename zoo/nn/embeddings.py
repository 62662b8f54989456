"""What stands in front of a trunk: token and patch embeddings with their positions."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.errors import ConfigError
from zoo.nn.config import Norm
from zoo.nn.norm import make_norm


class TokenEmbedding(nn.Module):
    """Token embeddings, with learned positions, token types, a norm and dropout where a system has them.

    Args:
        vocab: rows of the token table.
        width: D.
        positions: rows of the position table (0 = none); ids start at ``first``.
        first: the row of position 0 (OPT and BEiT-3 start at 2).
        types: rows of the token type table (0 = none).
        norm: embedding norm, or None.
        eps: of it.
        dropout: after it.
        std: of the initial normal.
    """

    def __init__(
        self,
        vocab: int,
        width: int,
        *,
        positions: int = 0,
        first: int = 0,
        types: int = 0,
        norm: Norm | None = None,
        eps: float = 1e-12,
        dropout: float = 0.0,
        std: float = 0.02,
    ) -> None:
        super().__init__()
        self.first = first
        self.tokens = _table(vocab, width, std)
        self.positions = _table(positions, width, std) if positions else None
        self.types = _table(types, width, std) if types else None
        self.norm = make_norm(norm, width, eps) if norm else None
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        ids: Tensor,
        *,
        position: Tensor | None = None,
        type_ids: Tensor | None = None,
        prefix: Tensor | None = None,
    ) -> Tensor:
        """Embed ids.

        Args:
            ids: ``[B, T]`` int64.
            position: ``[B, T]`` position ids, 0, 1, ... by default.
            type_ids: ``[B, T]`` token types, 0 by default.
            prefix: ``[B, N, D]`` rows put before the tokens, under the same norm and dropout but without positions (the
                Q-Former's queries).

        Returns:
            ``[B, N + T, D]``.
        """
        x: Tensor = self.tokens(ids)
        if self.positions is not None:
            if position is None:
                position = torch.arange(ids.shape[1], device=ids.device)[None]
                if ids.shape[1] + self.first > self.positions.num_embeddings:
                    rows = self.positions.num_embeddings - self.first
                    raise ConfigError(f"{ids.shape[1]} tokens for {rows} positions; shorten the text")
            x = x + self.positions(position + self.first)
        if self.types is not None:
            x = x + self.types(torch.zeros_like(ids) if type_ids is None else type_ids)
        return self.finish(x if prefix is None else torch.cat([prefix, x], 1))

    def finish(self, x: Tensor) -> Tensor:
        """Apply norm and dropout, for rows that are no tokens (queries alone)."""
        if self.norm is not None:
            x = self.norm(x)
        dropped: Tensor = self.dropout(x)
        return dropped


class PatchEmbedding(nn.Module):
    """Image to tokens: patches through one matrix, a CLS token, learned positions, a norm.

    Args:
        width: D.
        image_size: side in pixels.
        patch_size: side of a patch in pixels; must divide the image.
        channels: of the image.
        bias: of the patch matrix.
        cls: put a CLS token in front.
        positions: add learned positions (CLS has one too).
        first: rows of the position table before position 0, which nobody reads (BEiT-3 has 2).
        mask_token: own a vector that takes the place of hidden patches.
        norm: norm before the trunk (CLIP, ImageBind vision), or None.
        eps: of it.
        dropout: after all.
        std: of the initial normal.
    """

    def __init__(
        self,
        width: int,
        image_size: int,
        patch_size: int,
        *,
        channels: int = 3,
        bias: bool = True,
        cls: bool = True,
        positions: bool = True,
        first: int = 0,
        mask_token: bool = False,
        norm: Norm | None = None,
        eps: float = 1e-5,
        dropout: float = 0.0,
        std: float = 0.02,
    ) -> None:
        super().__init__()
        if image_size % patch_size:
            raise ConfigError(f"image_size {image_size} is not a multiple of patch_size {patch_size}")
        self.patch_size, self.first = patch_size, first
        self.grid = (image_size // patch_size, image_size // patch_size)
        self.patch = nn.Conv2d(channels, width, patch_size, patch_size, bias=bias)
        nn.init.trunc_normal_(self.patch.weight, std=std, a=-2 * std, b=2 * std)
        if self.patch.bias is not None:
            nn.init.zeros_(self.patch.bias)
        self.cls = nn.Parameter(torch.empty(1, 1, width)) if cls else None
        tokens = self.grid[0] * self.grid[1] + int(cls)
        self.positions = nn.Parameter(torch.empty(1, first + tokens, width)) if positions else None
        self.mask_token = nn.Parameter(torch.empty(1, 1, width)) if mask_token else None
        for parameter in (self.cls, self.positions, self.mask_token):
            if parameter is not None:
                nn.init.trunc_normal_(parameter, std=std, a=-2 * std, b=2 * std)
        self.norm = make_norm(norm, width, eps) if norm else None
        self.dropout = nn.Dropout(dropout)

    def forward(self, pixels: Tensor, hidden: Tensor | None = None) -> Tensor:
        """Embed ``[B, channels, H, W]`` to ``[B, (1 +) H·W / patch², D]``; other sizes resize the positions.

        Args:
            pixels: the image.
            hidden: ``[B, H·W / patch²]`` bool, the patches whose place the mask token takes.

        Raises:
            ConfigError: H or W is not a multiple of the patch size, or there is no mask token.
        """
        height, width = pixels.shape[-2:]
        if height % self.patch_size or width % self.patch_size:
            raise ConfigError(
                f"image of {height}x{width} pixels; expected multiples of the patch size {self.patch_size}"
            )
        x = self.patch(pixels).flatten(2).transpose(1, 2)  # [B, patches, D]
        if hidden is not None:
            if self.mask_token is None:
                raise ConfigError(
                    "patches to hide, but this embedding has no mask token; build it with mask_token=True"
                )
            x = torch.where(hidden.bool()[..., None], self.mask_token, x)
        if self.cls is not None:
            x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1)
        if self.positions is not None:
            grid = (height // self.patch_size, width // self.patch_size)
            table: Tensor = self.positions
            if grid != self.grid:
                table = resize_positions(table, self.grid, grid, extra=self.first + int(self.cls is not None))
            x = x + table[:, self.first :]
        if self.norm is not None:
            x = self.norm(x)
        dropped: Tensor = self.dropout(x)
        return dropped

    def fit_stored(self, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Stored tensors whose shape is not this module's, as far as they fit after interpolation: the positions of an
        image of another size, square as this one."""
        table, own = stored.get("positions"), self.positions
        if table is None or own is None or table.ndim != 3 or table.shape[2] != own.shape[2]:
            return {}
        extra = self.first + int(self.cls is not None)
        side = math.isqrt(max(0, table.shape[1] - extra))
        if side == 0 or side**2 + extra != table.shape[1]:
            return {}
        return {"positions": resize_positions(table, (side, side), self.grid, extra)}


def resize_positions(table: Tensor, old: tuple[int, int], new: tuple[int, int], extra: int = 1) -> Tensor:
    """Resize learned positions ``[1, extra + h·w, D]`` to another grid, bicubic without aligned corners.

    The first ``extra`` rows (CLS) stay as they are. This is what the released ViT loaders of BLIP-2, ALBEF and BLIP do.
    """
    if old == new:
        return table
    kept, grid = table[:, :extra], table[:, extra:]
    grid = grid.reshape(1, *old, -1).permute(0, 3, 1, 2).float()
    grid = F.interpolate(grid, new, mode="bicubic", align_corners=False)
    return torch.cat([kept, grid.permute(0, 2, 3, 1).flatten(1, 2).to(table.dtype)], 1)


def _table(rows: int, width: int, std: float) -> nn.Embedding:
    start = torch.empty(rows, width)
    nn.init.trunc_normal_(start, std=std, a=-2 * std, b=2 * std)
    return nn.Embedding(rows, width, _weight=start)
