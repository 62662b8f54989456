"""The perceiver resampler of Flamingo: any number of tokens read by a few learned latents."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.connectors.base import Connector, ConnectorConfig
from zoo.part import Features


class ResamplerLayer(nn.Module):
    """Latents read [media; latents], then pass a feed-forward network; both pre-norm with a residual (Flamingo,
    appendix A.1.1)."""

    def __init__(self, width: int, heads: int, head_dim: int, ffn: int) -> None:
        super().__init__()
        self.heads = heads
        inner = heads * head_dim
        self.norm_media = nn.LayerNorm(width)
        self.norm_latents = nn.LayerNorm(width)
        self.q = nn.Linear(width, inner, bias=False)
        self.kv = nn.Linear(width, 2 * inner, bias=False)
        self.out = nn.Linear(inner, width, bias=False)
        self.ffn = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, ffn, bias=False), nn.GELU(), nn.Linear(ffn, width, bias=False)
        )

    def forward(self, latents: Tensor, media: Tensor, mask: Tensor | None) -> Tensor:
        """Latents [B, n, D], media [B, N, D], key mask [B, 1, 1, N + n] bool or None -> latents."""
        x = self.norm_latents(latents)
        keys = torch.cat([self.norm_media(media), x], dim=1)  # [B, N + n, D]
        q = self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, H, n, d]
        k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.kv(keys).chunk(2, dim=-1))
        read = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        latents = latents + self.out(read.transpose(1, 2).flatten(2))
        out: Tensor = latents + self.ffn(latents)
        return out


class PerceiverResampler(Connector):
    """Learned latents, ``depth`` layers, a final norm, and linear maps where other widths differ from its own."""

    def __init__(self, config: PerceiverResamplerConfig, in_width: int, out_width: int) -> None:
        super().__init__()
        self.width = out_width
        self.tokens = config.latents
        d = config.width
        self.proj_in = nn.Linear(in_width, d) if in_width != d else nn.Identity()
        self.latents = nn.Parameter(torch.randn(config.latents, d) * 0.02)
        self.layers = nn.ModuleList(
            ResamplerLayer(d, config.heads, config.head_dim, config.ffn) for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(d)
        self.proj_out = nn.Linear(d, out_width) if out_width != d else nn.Identity()

    def forward(self, features: Features, text: Features | None = None) -> Features:
        return Features(self.proj_out(self.read(features)))

    def read(self, features: Features) -> Tensor:
        """The latents [B, n, D] that have read the tokens [B, N, D_in], after the final norm."""
        media = self.proj_in(features.tokens)  # [B, N, D]
        batch = media.shape[0]
        latents = self.latents.to(media.dtype).expand(batch, -1, -1)  # [B, n, D]
        mask = None
        if features.mask is not None:
            own = features.mask.new_ones(batch, self.tokens)
            mask = torch.cat([features.mask, own], dim=1)[:, None, None]  # [B, 1, 1, N + n]
        for layer in self.layers:
            latents = layer(latents, media, mask)
        normed: Tensor = self.norm(latents)
        return normed


@dataclass(frozen=True, kw_only=True)
class PerceiverResamplerConfig(ConnectorConfig):
    """Flamingo's resampler (arXiv 2204.14198, section 2.1 and appendix A.1.1): 64 latents, 6 layers, heads of 64, no
    biases.

    Attributes:
        latents: Learned latents, the tokens it returns.
        width: Width it works at; the encoder's tokens are mapped to it.
        depth: Layers.
        heads: Attention heads.
        head_dim: Width of a head; heads x head_dim need not be ``width``.
        ffn: Width of the feed-forward layers.
    """

    sized_by: ClassVar[str] = "ffn"

    latents: int = 64
    width: int = 1024
    depth: int = 6
    heads: int = 8
    head_dim: int = 64
    ffn: int = 4096

    def __post_init__(self) -> None:
        if min(self.latents, self.width, self.depth, self.heads, self.head_dim, self.ffn) < 1:
            raise ValueError("latents, width, depth, heads, head_dim and ffn must be 1 or more")

    def with_tokens(self, tokens: int, in_tokens: int) -> Self:
        return replace(self, latents=tokens)

    def build(self, *, in_width: int, in_tokens: int, out_width: int) -> PerceiverResampler:
        return PerceiverResampler(self, in_width, out_width)
