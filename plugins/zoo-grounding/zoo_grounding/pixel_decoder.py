"""PixelLM's pixel decoder (arXiv 2312.02228, section 3.2; ``MaskDecoderMultiScale`` of the release): masks from several
layers of the image encoder, coarse to fine, without SAM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.connectors.simple import mlp
from zoo.errors import ConfigError
from zoo.mask_decoders.base import MaskDecoder, MaskDecoderConfig, Seen
from zoo.part import Features
from zoo_grounding.token_fusion import FUSIONS, TokenFusion
from zoo_grounding.two_way import MLP, ChannelNorm, FourierGrid, TwoWayTransformer

MASK_TOKENS = 4
"""Learned tokens that read with the prompt, as in SAM; the first one's mask is the answer."""

NARROWER = 8
"""The last features of a mask are this many times narrower than the decoder."""


@dataclass(frozen=True, kw_only=True)
class PixelDecoderConfig(MaskDecoderConfig):
    """PixelLM's decoder. Defaults: the published one, 448 px and CLIP ViT-L/14.

    Attributes:
        layers: Blocks of the image encoder, one a scale, the coarsest mask's first; Python indexes.
        tokens: Tokens of the codebook a scale and target; a target consumes ``len(layers) * tokens``.
        width: Channels.
        depth: Two-way blocks a scale.
        heads: Attention heads.
        ffn: Hidden width of the feed-forward on tokens.
        fusion: How the tokens of a scale become one vector: ``released``, ``learned`` or ``mean``
            (``zoo_grounding.token_fusion``).
        reads_hidden: Read the features of padded patches as well, as the release does; otherwise they are zeros.
    """

    scale_settles: ClassVar[frozenset[str]] = frozenset({"layers"})

    layers: list[int] = field(default_factory=lambda: [-2, -11])
    tokens: int = 3
    width: int = 256
    depth: int = 2
    heads: int = 8
    ffn: int = 2048
    fusion: str = "released"
    reads_hidden: bool = False

    def __post_init__(self) -> None:
        if not self.layers or min(self.tokens, self.depth) < 1:
            raise ValueError(
                f"layers = {list(self.layers)}, tokens = {self.tokens}, depth = {self.depth}: expected 1 or more"
            )
        if self.width % max(2 * self.heads, NARROWER):
            raise ValueError(
                f"width = {self.width} must be a multiple of 2 * heads = {2 * self.heads} and of {NARROWER}"
            )
        if self.fusion not in FUSIONS:
            raise ValueError(f"fusion = {self.fusion!r} must be one of {', '.join(FUSIONS)}")

    @property
    def prompts(self) -> int:
        """Tokens that a target consumes."""
        return len(self.layers) * self.tokens

    def scaled(self, sizes: Mapping[str, Any]) -> Self:
        """Two blocks a scale are what there is at any size; the encoder's layers keep their place in its depth."""
        own = super().scaled({key: value for key, value in sizes.items() if key != "depth"})
        if "depth" not in sizes:
            return own
        first = -int(sizes["depth"])  # an encoder of two blocks has one before its last: both scales read it
        return replace(own, layers=[max(-2 - n, first) for n in range(len(self.layers))])

    def build(self, *, text_width: int, image_width: int) -> PixelDecoder:
        return PixelDecoder(self, text_width, image_width)


class PixelDecoder(MaskDecoder):
    """One two-way transformer a scale; a finer scale sees the features at twice the grid, brighter where the mask
    before it lies.

    What the released module has and nothing reads is left out: the heads of the three other mask tokens, the head that
    guesses the IoU, and SAM's embeddings of points, boxes and masks but for ``no_mask``.
    """

    def __init__(self, config: PixelDecoderConfig, text_width: int, image_width: int) -> None:
        super().__init__()
        c = config
        self.config = c
        self.width = c.width
        self.layers = tuple(c.layers)
        scales = len(c.layers)
        self.prompts = c.prompts
        self.image_proj = mlp([image_width, 2 * text_width, text_width])
        self.neck = nn.Sequential(
            nn.Conv2d(text_width, c.width, 1, bias=False),
            ChannelNorm(c.width),
            nn.Conv2d(c.width, c.width, 3, padding=1, bias=False),
            ChannelNorm(c.width),
        )
        self.fusion = TokenFusion(scales, c.tokens, c.fusion)
        self.no_mask = nn.Parameter(torch.randn(1, c.width))
        self.grid, self.fine_grid = FourierGrid(c.width), FourierGrid(c.width)
        self.transformer = nn.ModuleList(TwoWayTransformer(c.width, c.depth, c.heads, c.ffn) for _ in c.layers)
        self.iou_token = nn.Parameter(torch.randn(1, c.width))
        self.mask_tokens = nn.Parameter(torch.randn(MASK_TOKENS, c.width))
        self.level_embed = nn.Parameter(torch.randn(scales, c.width))
        if scales > 1:
            self.upsample = nn.Sequential(nn.ConvTranspose2d(c.width, c.width, 2, 2), ChannelNorm(c.width), nn.GELU())
        narrow = c.width // NARROWER
        self.upscale = nn.Sequential(nn.ConvTranspose2d(c.width, narrow, 2, 2), ChannelNorm(narrow), nn.GELU())
        self.hyper = MLP(c.width, c.width, c.width, narrow)

    def encode(self, pixel_values: Tensor | None, features: Sequence[Features] = ()) -> Seen:
        """The features [N, C, h, w] of every scale: ``image_proj``, then ``neck``.

        Raises:
            ConfigError: Another number of layers, or tokens that are no grid of patches.
        """
        if len(features) != len(self.layers):
            raise ConfigError(f"the pixel decoder reads {len(self.layers)} layers of the encoder, not {len(features)}")
        seen = []
        for level in features:
            if level.grid is None or level.grid[0] * level.grid[1] != level.tokens.shape[1]:
                raise ConfigError(
                    "the pixel decoder reads a grid of patches without a class token: set encoder.cls=false"
                )
            tokens = level.tokens
            if level.mask is not None and not self.config.reads_hidden:
                tokens = tokens.masked_fill(~level.mask[..., None], 0.0)
            cells = self.image_proj(tokens).transpose(1, 2).unflatten(2, level.grid)  # [N, D, h, w]
            seen.append(self.neck(cells))
        return tuple(seen)

    def decode(self, seen: Seen, prompts: Tensor, row: Tensor) -> Tensor:
        """Logits [M, 2^S h, 2^S w] at the finest of the S scales' grids: the weighted sum of all scales' masks, coarser
        ones enlarged bilinearly."""
        masks = self.scale_masks(seen, prompts, row)
        size = masks[-1].shape[-2:]
        out: Tensor | None = None
        for mask, weight in zip(masks, self.fusion.scale_weights, strict=True):
            fine = F.interpolate(mask[:, None], size, mode="bilinear")[:, 0] if len(mask) else mask.new_empty(0, *size)
            out = weight * fine if out is None else out + weight * fine
        assert out is not None
        return out

    def scale_masks(self, seen: Seen, prompts: Tensor, row: Tensor) -> list[Tensor]:
        """The logits [M, 2h, 2w], [M, 4h, 4w], ... of each scale before they are added up; as ``decode``."""
        fused = self.fusion(prompts)  # [M, scales, C]
        masks: list[Tensor] = []
        for scale in range(len(self.layers)):
            # the features of an image are enlarged once, for all its targets
            image = seen[scale]
            for _ in range(scale):
                image = self.upsample(image)
            masks.append(self._scale_mask(scale, image[row], fused[:, scale], masks[-1] if masks else None))
        return masks

    def _scale_mask(self, scale: int, image: Tensor, prompt: Tensor, before: Tensor | None) -> Tensor:
        """Logits [M, 2h, 2w] of one scale from its features [M, C, h, w], prompts [M, C] and the mask [M, h, w] of the
        scale before."""
        if not len(prompt):
            return image.new_empty(0, 2 * image.shape[-2], 2 * image.shape[-1])
        if before is not None:
            image = (before[:, None].sigmoid() + 1) * image
        image = image + self.no_mask[..., None, None]
        grid = (self.fine_grid if scale else self.grid)(*image.shape[-2:])
        own = torch.cat([self.iou_token, self.mask_tokens]).expand(len(prompt), -1, -1)
        tokens = torch.cat([own, prompt[:, None]], 1) + self.level_embed[scale]  # [M, 1 + 4 + 1, C]
        tokens, image = self.transformer[scale](image, grid, tokens)
        pixels = self.upscale(image)  # [M, C/8, 2h, 2w]
        return torch.einsum("mc,mchw->mhw", self.hyper(tokens[:, 1]), pixels)
