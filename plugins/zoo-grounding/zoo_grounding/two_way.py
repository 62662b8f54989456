"""The two-way transformer of SAM's mask decoder (Kirillov et al. 2023, arXiv 2304.02643, section A), as PixelLM stacks
one a scale, and what stands around it: position grids and channel norms."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORM_EPS = 1e-5
"""Of the norms on tokens; those on channels have 1e-6. Both are the released code's."""


class Attention(nn.Module):
    """Multi-head attention whose inner width may be a part of the outer one: ``q_proj``, ``k_proj``, ``v_proj``,
    ``out_proj``."""

    def __init__(self, width: int, inner: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, inner)
        self.k_proj = nn.Linear(width, inner)
        self.v_proj = nn.Linear(width, inner)
        self.out_proj = nn.Linear(inner, width)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Queries [B, T, width] read keys and values [B, S, width]: [B, T, width]."""
        rows = (self.q_proj(q), self.k_proj(k), self.v_proj(v))
        split = [x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in rows]  # [B, heads, T or S, d]
        read: Tensor = self.out_proj(F.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2))
        return read


class FeedForward(nn.Module):
    """``lin1``, ReLU, ``lin2``."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.lin1 = nn.Linear(width, hidden)
        self.lin2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.lin2(F.relu(self.lin1(x)))
        return out


class TwoWayBlock(nn.Module):
    """Tokens read each other, then the image; a feed-forward on the tokens; then the image reads the tokens.

    Args:
        first: The block whose self-attention sees no positions and has no residual.
    """

    def __init__(self, width: int, heads: int, ffn: int, *, first: bool) -> None:
        super().__init__()
        self.first = first
        self.self_attn = Attention(width, width, heads)
        self.norm1 = nn.LayerNorm(width, NORM_EPS)
        self.cross_attn_token_to_image = Attention(width, width // 2, heads)
        self.norm2 = nn.LayerNorm(width, NORM_EPS)
        self.mlp = FeedForward(width, ffn)
        self.norm3 = nn.LayerNorm(width, NORM_EPS)
        self.norm4 = nn.LayerNorm(width, NORM_EPS)
        self.cross_attn_image_to_token = Attention(width, width // 2, heads)

    def forward(self, tokens: Tensor, image: Tensor, place: Tensor, grid: Tensor) -> tuple[Tensor, Tensor]:
        """One block.

        Args:
            tokens: [B, T, C].
            image: [B, S, C].
            place: [B, T, C], added to tokens wherever they are compared: the tokens as they came in.
            grid: [1, S, C], the same for the image.
        """
        if self.first:
            tokens = self.self_attn(tokens, tokens, tokens)
        else:
            where = tokens + place
            tokens = tokens + self.self_attn(where, where, tokens)
        tokens = self.norm1(tokens)
        seen = image + grid
        tokens = self.norm2(tokens + self.cross_attn_token_to_image(tokens + place, seen, image))
        tokens = self.norm3(tokens + self.mlp(tokens))
        image = self.norm4(image + self.cross_attn_image_to_token(seen, tokens + place, tokens))
        return tokens, image


class TwoWayTransformer(nn.Module):
    """``layers`` of two-way blocks, and a last look of the tokens at the image."""

    def __init__(self, width: int, depth: int, heads: int, ffn: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(TwoWayBlock(width, heads, ffn, first=i == 0) for i in range(depth))
        self.final_attn_token_to_image = Attention(width, width // 2, heads)
        self.norm_final_attn = nn.LayerNorm(width, NORM_EPS)

    def forward(self, image: Tensor, grid: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Read an image with tokens.

        Args:
            image: [B, C, h, w].
            grid: [C, h, w], the positions of its cells.
            tokens: [B, T, C].

        Returns:
            The tokens [B, T, C] and the image [B, C, h, w].
        """
        cells, places = image.flatten(2).transpose(1, 2), grid.flatten(1).T[None]  # [B, h*w, C], [1, h*w, C]
        place = tokens
        for layer in self.layers:
            tokens, cells = layer(tokens, cells, place, places)
        read = self.final_attn_token_to_image(tokens + place, cells + places, cells)
        return self.norm_final_attn(tokens + read), cells.transpose(1, 2).reshape(image.shape)


class FourierGrid(nn.Module):
    """Sines and cosines of random projections of a cell's centre (Tancik et al. 2020); nothing of it learns."""

    positional_encoding_gaussian_matrix: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("positional_encoding_gaussian_matrix", torch.randn(2, width // 2))

    def forward(self, height: int, width: int) -> Tensor:
        """The positions [C, height, width] of a grid."""
        matrix = self.positional_encoding_gaussian_matrix
        y = (torch.arange(height, device=matrix.device) + 0.5) / height
        x = (torch.arange(width, device=matrix.device) + 0.5) / width
        centres = torch.stack([x.expand(height, width), y[:, None].expand(height, width)], -1)  # [h, w, 2], in 0..1
        turns = 2 * math.pi * ((2 * centres - 1).to(matrix.dtype) @ matrix)  # [h, w, C/2]
        return torch.cat([turns.sin(), turns.cos()], -1).permute(2, 0, 1)


class ChannelNorm(nn.Module):
    """Layer norm over the channels of [B, C, h, w], eps 1e-6."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        last = x.movedim(1, -1)
        return F.layer_norm(last, last.shape[-1:], self.weight, self.bias, 1e-6).movedim(-1, 1)


class MLP(nn.Module):
    """Linears ``layers.0``, ``layers.1``, ... with ReLU between."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        for number, layer in enumerate(self.layers):
            x = layer(x) if number == 0 else layer(F.relu(x))
        return x
