"""A diffusion transformer that reads tokens by cross-attention: diffusers' ``PixArtTransformer2DModel``.

DiT's blocks (arXiv 2212.09748) with the cross-attention of PixArt-alpha (arXiv 2310.00426, section 2.3) between
attention and MLP, and one modulation for all blocks (adaLN-single) beside a table of each block's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zoo.denoisers.base import Denoiser, DenoiserConfig
from zoo.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class DiTConfig(DenoiserConfig):
    """Defaults: DiT-S/2, 12 blocks of width 384.

    Attributes:
        width: Of the blocks.
        depth: Blocks.
        heads: Attention heads.
        patch: Side of a patch, latent pixels.
    """

    width: int = 384
    depth: int = 12
    heads: int = 6
    patch: int = 2

    def __post_init__(self) -> None:
        if self.depth < 1 or self.heads < 1 or self.width % self.heads or self.width % 4:
            raise ValueError(
                f"width = {self.width} must be a multiple of 4 and of heads = {self.heads}, depth 1 or more"
            )
        if self.patch < 1:
            raise ValueError(f"patch = {self.patch} must be 1 or more")

    def build(
        self, condition_width: int, *, channels: int = 4, grid: tuple[int, int] = (32, 32), pooled_width: int = 0
    ) -> DiT:
        return DiT(self, condition_width, channels, grid)


class DiT(Denoiser):
    """``net``, a ``PixArtTransformer2DModel``. Drawn at random it predicts zero, and its blocks change nothing:
    adaLN-Zero, section 3.2 of the DiT paper; the projection behind cross-attention is zero as in PixArt's release."""

    def __init__(self, config: DiTConfig, condition_width: int, channels: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.config, self.channels, self.condition_width = config, channels, condition_width
        self._check_grid(grid)
        from zoo import torchvision_ops

        torchvision_ops.ensure()
        from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel

        self.net: Any = PixArtTransformer2DModel(
            num_attention_heads=config.heads,
            attention_head_dim=config.width // config.heads,
            in_channels=channels,
            out_channels=channels,
            num_layers=config.depth,
            cross_attention_dim=config.width,
            sample_size=max(grid),
            patch_size=config.patch,
            caption_channels=condition_width,
            use_additional_conditions=False,
        )
        _start(self.net)

    def forward(
        self,
        latents: Tensor,
        time: Tensor,
        condition: Tensor,
        condition_mask: Tensor | None = None,
        pooled: Tensor | None = None,
        size_ids: Tensor | None = None,
    ) -> Tensor:
        self._check(condition, pooled)
        self._check_grid((latents.shape[-2], latents.shape[-1]))
        out: Tensor = self.net(
            latents, encoder_hidden_states=condition, timestep=time, encoder_attention_mask=condition_mask
        ).sample
        return out

    def attention_levels(self) -> dict[str, int]:
        return dict.fromkeys(self.attention_processors(), self.config.patch)

    def _check_grid(self, grid: tuple[int, int]) -> None:
        if any(side % self.config.patch for side in grid):
            raise ConfigError(
                f"latents of {grid[0]}x{grid[1]} do not divide into patches of {self.config.patch}: set denoiser.patch"
                " to a divisor, or another image_size"
            )


def _start(net: Any) -> None:
    with torch.no_grad():
        zero: list[nn.Linear] = [net.adaln_single.linear, net.proj_out]
        for block in net.transformer_blocks:
            block.scale_shift_table.zero_()  # shift, scale and gate of attention, then of the MLP: [6, D]
            zero.append(block.attn2.to_out[0])
        for linear in zero:
            linear.weight.zero_()
            linear.bias.zero_()
