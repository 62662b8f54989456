"""Rotary and relative positions."""

from __future__ import annotations

import torch
from torch import Tensor

Rotary = tuple[Tensor, Tensor]


def frequencies(dims: int, theta: float, axes: int, half: bool = False, device: torch.device | None = None) -> Tensor:
    """Return the angles that one step turns the pairs of an axis by: ``[dims / axes / 2]`` float32.

    Args:
        dims, theta, axes, half: see :func:`rotary`.
    """
    own = dims // axes
    frequency = theta ** (-torch.arange(0, own, 2, dtype=torch.float32, device=device) / own)
    return frequency.half().float() if half else frequency


def rotary(
    position: Tensor,
    dims: int,
    theta: float,
    axes: int,
    dtype: torch.dtype,
    half: bool = False,
    frequency: Tensor | None = None,
) -> Rotary:
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
        half: round the frequencies to float16 first (ChatGLM, modeling_chatglm.py, RotaryEmbedding).
        frequency: what :func:`frequencies` gave for the same arguments, so that it is computed once for many calls.
    """
    if frequency is None:
        frequency = frequencies(dims, theta, axes, half, position.device)
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


def image_relative_index(grid: tuple[int, int]) -> Tensor:
    """Return the row of the relative table for every pair of a CLS token and a grid of patches (BEiT).

    Returns:
        ``[1 + h·w, 1 + h·w]`` int64. Rows 0 to (2h-1)(2w-1)-1 are the offsets between patches, row-major; then CLS to a
        patch, a patch to CLS, CLS to itself.
    """
    height, width = grid
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    y, x = y.flatten(), x.flatten()
    down, right = y[:, None] - y + height - 1, x[:, None] - x + width - 1
    offsets = (2 * height - 1) * (2 * width - 1)
    return _with_cls(down * (2 * width - 1) + right, offsets)


def pair_relative_index(grid: tuple[int, int], text: int, longest_text: int) -> Tensor:
    """Return the row of the relative table for every pair of tokens of text and image (VLMo's build_relative_position).

    The table holds the rows of :func:`image_relative_index`, one row text to image, one image to text, and
    2·longest_text rows of the text (CLS included).

    Args:
        grid: patches of the image.
        text: text tokens T, CLS included; they stand before the image.
        longest_text: the text length the table was made for (196 in the released files).

    Returns:
        ``[T + 1 + h·w, T + 1 + h·w]`` int64; its corners serve text alone and image alone.
    """
    image = image_relative_index(grid)
    rows = int(image[0, 0]) + 1
    place = torch.arange(text - 1)
    words = place - place[:, None] + longest_text - 2 + rows + 2
    index = torch.empty(text + len(image), text + len(image), dtype=torch.long)
    index[:text, :text] = _with_cls(words, rows + 2 * longest_text + 2 - 3)
    index[:text, text:], index[text:, :text], index[text:, text:] = rows, rows + 1, image
    return index


def _with_cls(index: Tensor, first: int) -> Tensor:
    """Put a CLS token before the tokens of ``index``, whose three relations are rows ``first`` and on."""
    index = torch.nn.functional.pad(index, (1, 0, 1, 0))
    index[0, :], index[:, 0] = first, first + 1
    index[0, 0] = first + 2
    return index
