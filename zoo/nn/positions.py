"""Rotary and relative positions."""

from __future__ import annotations

import torch
from torch import Tensor

Rotary = tuple[Tensor, Tensor]


def rotary(position: Tensor, dims: int, theta: float, axes: int, dtype: torch.dtype) -> Rotary:
    """Return cos and sin, each ``[B, T, 1, dims / 2]``, of the rotated dimensions of a head.

    Axis a owns ``dims / axes`` dimensions with frequencies theta^(-2i / (dims / axes)) (RoFormer, arXiv 2104.09864,
    eq. 15; two axes as in LlamaGen and ChatGLM). A negative id gives a row of zeros, not the angle 0: LlamaGen's
    condition tokens.

    Args:
        position: ``[B, T]`` or ``[B, axes, T]`` ids.
        dims: rotated dimensions of a head, all axes together.
        theta: the base.
        axes: position ids per token; ``[B, T]`` ids serve every axis.
        dtype: of the result; angles are computed in float32.
    """
    own = dims // axes
    frequency = theta ** (-torch.arange(0, own, 2, dtype=torch.float32, device=position.device) / own)
    if position.ndim == 2:
        position = position[:, None].expand(-1, axes, -1)
    angle = position.transpose(1, 2).float()[..., None] * frequency  # [B, T, axes, own / 2]
    there = (position >= 0).transpose(1, 2)[..., None]
    cos, sin = (part.masked_fill(~there, 0.0).flatten(2)[:, :, None].to(dtype) for part in (angle.cos(), angle.sin()))
    return cos, sin


def rotate(x: Tensor, turn: Rotary) -> Tensor:
    """Rotate the first dimensions of the heads ``[B, T, heads, head]``, half-split: pairs are (i, i + dims / 2)."""
    cos, sin = turn
    half = cos.shape[-1]
    first, second = x[..., :half], x[..., half : 2 * half]
    parts = [first * cos - second * sin, second * cos + first * sin]
    if 2 * half < x.shape[-1]:
        parts.append(x[..., 2 * half :])
    return torch.cat(parts, -1)


def relative_bias(table: Tensor, index: Tensor) -> Tensor:
    """Look up one layer's relative bias.

    Args:
        table: ``[rows, heads]``.
        index: ``[T, K]`` or ``[B, T, K]`` int64 rows of the table.

    Returns:
        ``[1 | B, heads, T, K]``.
    """
    bias = torch.nn.functional.embedding(index, table)  # [(B,) T, K, heads]
    return (bias[None] if bias.ndim == 3 else bias).permute(0, 3, 1, 2)
