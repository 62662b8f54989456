"""A vision transformer (Dosovitskiy et al. 2021) on the zoo's own trunk, for towers whose inside is part of the
system."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from torch import Tensor

from zoo.encoders.base import Encoder, ImageEncoderConfig
from zoo.encoders.open_clip import check_image, check_vit_sizes, kept_blocks
from zoo.nn import PatchEmbedding, Trunk, TrunkConfig, init_clip_, start_std
from zoo.nn.config import Act, Norm, Placement
from zoo.part import Features

INITS = ("normal", "clip")


@dataclass(frozen=True, kw_only=True)
class ViTConfig(ImageEncoderConfig):
    """A vision transformer; defaults: ViT-B/16.

    Attributes:
        patch_size: Side of a patch, pixels.
        width: Width of the tokens.
        depth: Blocks; those after ``layer`` are left out unless ``pool`` needs them.
        heads: Attention heads.
        ffn: Hidden width of the feed-forward network.
        bias: Which of q, k, v own a bias, as letters (EVA: ``qv``).
        act: gelu, gelu_tanh, quick_gelu, silu or relu.
        gated: down(act(gate(x)) * up(x)).
        norm: layer or rms.
        eps: Of every norm.
        placement: Where a block's norms stand: pre, post, branch.
        patch_bias: The patch matrix owns a bias.
        class_token: Put one learned token before the patches.
        pre_norm: A norm before the first block.
        final_norm: A norm after the last block; it applies to ``layer = -1`` and to ``pooled``.
        pool: Return ``pooled``: the class token where there is one, else the mean of the patches.
        layer_scale: Initial scale of every branch; None = none.
        dropout, drop_path: In training.
        init: ``normal`` (0.02, more where the width is below 512, see ``start_std``; truncated) or ``clip`` (by width
            and depth, as CLIP's text tower).
    """

    patch_size: int = 16
    width: int = 768
    depth: int = 12
    heads: int = 12
    ffn: int = 3072
    bias: str = "qkv"
    act: Act = "gelu"
    gated: bool = False
    norm: Norm = "layer"
    eps: float = 1e-6
    placement: Placement = "pre"
    patch_bias: bool = True
    class_token: bool = True
    pre_norm: bool = False
    final_norm: bool = True
    pool: bool = True
    layer_scale: float | None = None
    dropout: float = 0.0
    drop_path: float = 0.0
    init: str = "normal"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_vit_sizes(self)
        if self.init not in INITS:
            raise ValueError(f"init = {self.init!r} must be one of {', '.join(INITS)}")

    @property
    def kept(self) -> int:
        """Number of blocks that are built."""
        return self.depth if self.pool else kept_blocks(self.layer, self.depth)

    def trunk(self) -> TrunkConfig:
        """The blocks' configuration, without those nothing reads."""
        return TrunkConfig(
            width=self.width,
            depth=self.kept,
            heads=self.heads,
            ffn=self.ffn,
            norm=self.norm,
            eps=self.eps,
            placement=self.placement,
            final_norm=self.final_norm and self.kept == self.depth,
            bias=self.bias,
            act=self.act,
            gated=self.gated,
            layer_scale=self.layer_scale,
            dropout=self.dropout,
            drop_path=self.drop_path,
            init_std=start_std(self.width),
        )

    def build(self) -> ViT:
        return ViT(self)


class ViT(Encoder):
    """``embed`` (a ``PatchEmbedding``) and ``trunk``."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        self.layer = kept_blocks(config.layer, config.depth) - 1
        self.width = config.width
        self.pooled_width = config.width if config.pool else 0
        self.embed = PatchEmbedding(
            config.width,
            config.image_size,
            config.patch_size,
            bias=config.patch_bias,
            cls=config.class_token,
            norm=config.norm if config.pre_norm else None,
            eps=config.eps,
            dropout=config.dropout,
        )
        self.trunk = Trunk(config.trunk())
        if config.init == "clip":
            init_clip_(self.trunk)
        self.grid = self.embed.grid
        self.tokens = self.grid[0] * self.grid[1] + int(config.class_token and config.cls)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Features:
        """Encode pixel values [B, 3, H, W] of the configured size.

        Returns:
            ``tokens`` [B, (1+)h*w, width] (layer -1: after the final norm, else the block's output) and ``pooled``
            [B, width].
        """
        c = self.config
        check_image(x, c.image_size)
        embedded = self.embed(x)  # [B, (1+)h*w, D]
        if self.layer == c.kept - 1:
            tokens = last = cast(Tensor, self.trunk(embedded))
        else:
            tokens = cast(Tensor, self.trunk(embedded, layers=slice(0, self.layer + 1), final_norm=False))
            last = cast(Tensor, self.trunk(tokens, layers=slice(self.layer + 1, None)))
        pooled = None
        if c.pool:
            pooled = last[:, 0] if c.class_token else last.mean(1)
        if c.class_token and not c.cls:
            tokens = tokens[:, 1:]
        return Features(tokens, None, pooled, self.grid)
