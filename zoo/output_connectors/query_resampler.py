"""SEED-X's way out (arXiv 2404.14396, section 3): queries regress the image encoder's features from the language
model's states, and a resampler makes them a diffusion model's condition."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.connectors.perceiver_resampler import PerceiverResampler, PerceiverResamplerConfig
from zoo.errors import ConfigError
from zoo.output_connectors.base import OutputConnector, OutputConnectorConfig, Target, Unconditional
from zoo.part import Features


def sincos_2d(width: int, side: int) -> Tensor:
    """Positions [side * side, width] of a square grid in row order: sines and cosines of the column, then of the row
    (``get_2d_sincos_pos_embed`` of the released MAE, arXiv 2111.06377)."""
    rates = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width / 4))  # [w / 4]
    row, column = (axis.flatten() for axis in torch.meshgrid(*[torch.arange(side).double()] * 2, indexing="ij"))
    angles = [axis[:, None] * rates for axis in (column, row)]
    return torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], 1).float()


def side_of(tokens: int, what: str) -> int:
    """Side of a square of ``tokens``.

    Raises:
        ConfigError: They are none.
    """
    side = math.isqrt(tokens)
    if side < 1 or side * side != tokens:
        raise ConfigError(
            f"output connector 'query-resampler' lays {what} on a square grid, and there are {tokens}: expected 4, 9,"
            " 16, ..."
        )
    return side


class QueryResampler(nn.Module):
    """One cross-attention of queries on a grid over tokens on a grid, both with sine positions (``Resampler`` of
    Qwen-VL, arXiv 2308.12966, section 2.1): no residual and nothing behind it.

    Args:
        queries: A square number; tokens on another grid get interpolated positions.
        width: Of the queries and of what is returned; a multiple of 4 and of ``heads``.
        heads: Attention heads.
        in_width: Of the tokens, which are mapped to ``width`` where it differs.
    """

    position: Tensor

    def __init__(self, queries: int, width: int, heads: int, in_width: int) -> None:
        super().__init__()
        if width % 4 or width % heads:
            raise ConfigError(
                f"output connector 'query-resampler' works at the image encoder's width, {width}: expected a multiple"
                f" of 4 and of feature_heads = {heads}"
            )
        self.side = side_of(queries, "its queries")
        self.query = nn.Parameter(torch.empty(queries, width))
        nn.init.trunc_normal_(self.query, std=0.02)
        self.kv = nn.Linear(in_width, width, bias=False) if in_width != width else nn.Identity()
        self.norm_q, self.norm_kv = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.register_buffer("position", sincos_2d(width, self.side))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Tokens [N, S, D_in] of a square grid, mask [N, S] bool (True = real) -> [N, queries, width]."""
        keys = self.norm_kv(self.kv(x))  # [N, S, D]
        query = self.norm_q(self.query).to(keys.dtype) + self.position.to(keys.dtype)
        placed = keys + self._positions(x.shape[1]).to(keys.dtype)
        hidden = None if mask is None else ~mask.bool()
        read = self.attn(query.expand(len(x), -1, -1), placed, keys, key_padding_mask=hidden, need_weights=False)
        out: Tensor = read[0]
        return out

    def _positions(self, tokens: int) -> Tensor:
        """Positions [tokens, width] of the tokens' own grid (``get_abs_pos``)."""
        side = side_of(tokens, "states")
        if side == self.side:
            return self.position
        grid = self.position.float().view(1, self.side, self.side, -1).permute(0, 3, 1, 2)
        grown = F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
        return grown.permute(0, 2, 3, 1).flatten(0, 2)


class AttentionPool(nn.Module):
    """One vector of tokens: their mean reads them and itself, at learned positions (CLIP's ResNets, arXiv 2103.00020,
    section 2.4).

    Args:
        tokens: How many there are.
        width: Their width.
        heads: Attention heads.
        out_width: Width of the vector.
    """

    def __init__(self, tokens: int, width: int, heads: int, out_width: int) -> None:
        super().__init__()
        self.heads = heads
        self.position = nn.Parameter(torch.randn(tokens + 1, width) / width**0.5)
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, out_width)

    def forward(self, x: Tensor) -> Tensor:
        """[N, tokens, width] -> [N, out_width]."""
        x = torch.cat([x.mean(1, keepdim=True), x], 1) + self.position.to(x.dtype)
        q, k, v = (
            layer(rows).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, rows in ((self.q, x[:, :1]), (self.k, x), (self.v, x))
        )  # [N, H, 1 | tokens + 1, d]
        read = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # [N, 1, D]
        out: Tensor = self.out(read[:, 0])
        return out


class FeatureAdapter(PerceiverResampler):
    """``ResamplerXLV2``: Flamingo's resampler over image features; where the denoiser reads a vector too, one pooled
    of the same latents.

    Args:
        config: Of the resampler.
        in_width: Of the features.
        out_width: Of the condition.
        pooled_width: Of the vector; 0 = none.
    """

    def __init__(self, config: PerceiverResamplerConfig, in_width: int, out_width: int, pooled_width: int = 0) -> None:
        super().__init__(config, in_width, out_width)
        width = config.width
        if in_width == width:
            self.proj_in = nn.Linear(in_width, width)
        self.proj_out = nn.Linear(width, out_width)  # two maps side by side as released: of 768 and 1280
        self.pool = AttentionPool(config.latents, width, config.heads, pooled_width) if pooled_width else None

    def forward(self, features: Features, text: Features | None = None) -> Features:
        latents = self.read(features)  # [N, n, D]
        pooled = None if self.pool is None else self.pool(latents)
        return Features(self.proj_out(latents), pooled=pooled)


@dataclass(frozen=True, kw_only=True)
class QueryResamplerConfig(OutputConnectorConfig):
    """SEED-X: 64 queries of 32 heads over the states, which come out as the image encoder's features; and a resampler
    of 4 layers, width 1024, 16 heads of 64 and 64 latents over those.

    Attributes:
        queries: Features an image is regressed to, a square number; consecutive patches are averaged to as many.
        feature_heads: Heads of the regression, which works at the image encoder's width.
        latents, width, depth, heads, head_dim, ffn: Of the resampler; its latents are the condition's tokens.
    """

    queries: int = 64
    feature_heads: int = 32
    latents: int = 64
    width: int = 1024
    depth: int = 4
    heads: int = 16
    head_dim: int = 64
    ffn: int = 4096

    def __post_init__(self) -> None:
        sizes = (self.queries, self.feature_heads, self.latents, self.width, self.depth, self.heads, self.head_dim)
        if min(*sizes, self.ffn) < 1:
            raise ValueError("queries, feature_heads, latents, width, depth, heads, head_dim and ffn must be 1 or more")

    def build(
        self, *, in_width: int, in_tokens: int, out_width: int, image_width: int = 0, image_tokens: int = 0
    ) -> RegressedFeatures:
        """Raises ConfigError where there are no image features to regress, or numbers do not fit."""
        if not image_width or image_tokens % self.queries:
            raise ConfigError(
                f"output connector 'query-resampler' regresses the image encoder's {image_tokens} patches to"
                f" {self.queries} features: expected a multiple; set output_connector.queries"
            )
        side_of(in_tokens, "the states of an image's tokens")
        return RegressedFeatures(self, in_width, out_width, image_width)


class RegressedFeatures(OutputConnector):
    """``resampler`` from states to image features, ``adapter`` from features to the condition, which learns from real
    images (SEED-X's de-tokenizer). Guidance leaves the condition out with a blank image's features."""

    aligns: ClassVar[Target] = "image"
    unconditional: ClassVar[Unconditional] = "image"
    shifted: ClassVar[bool] = False

    def __init__(self, config: QueryResamplerConfig, in_width: int, out_width: int, image_width: int) -> None:
        super().__init__()
        self.width, self.outputs = out_width, config.latents
        self.aligned = (config.queries, image_width)
        self.resampler = QueryResampler(config.queries, image_width, config.feature_heads, in_width)
        perceiver = PerceiverResamplerConfig(
            latents=config.latents, width=config.width, depth=config.depth, heads=config.heads,
            head_dim=config.head_dim, ffn=config.ffn,
        )  # fmt: skip
        self.adapter = FeatureAdapter(perceiver, image_width, out_width)

    def align(self, states: Tensor, mask: Tensor | None = None) -> Tensor:
        """Features [N, queries, image width], to be those of the image."""
        out: Tensor = self.resampler(states, mask)
        return out

    def condition(self, aligned: Tensor) -> Features:
        out: Features = self.adapter(Features(aligned))
        return out

    def target(self, features: Tensor) -> Tensor:
        """Means of consecutive patches [N, P, D] -> [N, queries, D]: SEED-X pools 256 to 64 along the sequence."""
        count = self.aligned[0]
        return features.reshape(len(features), count, -1, features.shape[2]).mean(2)
