"""The convolutional encoder and decoder that published image tokenizers share, with what they differ in as fields.

The family began with VQGAN (arXiv 2012.09841): levels of residual blocks, each level on half the grid of the one before
it, a middle at the coarsest grid, and the way back. Show-o's MAGVIT-v2, LlamaGen's VQ, Chameleon's VQGAN and the KL
autoencoders of latent diffusion have attention in the middle, pad at the right and the bottom before they go down, and
go up by nearest neighbours; Open-MAGVIT2 has no attention, pads evenly, goes up by depth-to-space, and normalises every
level of the decoder by statistics of the codes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from zoo.objectives.base import full_precision

EPS = 1e-6
"""Of every group norm of the family."""


@dataclass(frozen=True)
class Levels:
    """The sizes of an encoder or a decoder; levels count from the finest grid (the image's) to the coarsest.

    Attributes:
        base: Channels of the first convolution of the encoder.
        widths: Channels of every level.
        blocks: Residual blocks of every level.
        attention: Whether an attention follows every block of the level.
        middle: Residual blocks at the coarsest grid.
        middle_attention: One attention after the first of them.
        groups: Groups of every norm.
        bias: Residual blocks and the encoder's first convolution have biases.
    """

    base: int
    widths: tuple[int, ...]
    blocks: tuple[int, ...]
    attention: tuple[bool, ...]
    middle: int = 2
    middle_attention: bool = True
    groups: int = 32
    bias: bool = True

    def norm(self, width: int, affine: bool = True) -> nn.GroupNorm:
        """The group norm of ``width`` channels."""
        return nn.GroupNorm(self.groups, width, eps=EPS, affine=affine)


class Residual(nn.Module):
    """x + two 3 x 3 convolutions behind norms; a 1 x 1 convolution on x where the width changes."""

    def __init__(self, levels: Levels, fan_in: int, width: int) -> None:
        super().__init__()
        self.norm1 = levels.norm(fan_in)
        self.conv1 = nn.Conv2d(fan_in, width, 3, padding=1, bias=levels.bias)
        self.norm2 = levels.norm(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=levels.bias)
        self.shortcut = nn.Conv2d(fan_in, width, 1, bias=levels.bias) if fan_in != width else None

    def forward(self, x: Tensor) -> Tensor:
        """[B, fan_in, h, w] to [B, width, h, w]."""
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        return y + (x if self.shortcut is None else self.shortcut(x))  # type: ignore[no-any-return]


class Attention(nn.Module):
    """x + single-head attention over all places of the grid, scaled by C^-1/2; projections are 1 x 1 convolutions."""

    def __init__(self, levels: Levels, width: int) -> None:
        super().__init__()
        self.norm = levels.norm(width)
        self.q, self.k, self.v, self.out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] to the same."""
        y = self.norm(x)
        q, k, v = (part(y).flatten(2).transpose(1, 2)[:, None] for part in (self.q, self.k, self.v))  # [B, 1, hw, C]
        y = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2).reshape(x.shape)
        return x + self.out(y)  # type: ignore[no-any-return]


class Down(nn.Module):
    """A 3 x 3 convolution of stride 2 to half the grid.

    Args:
        even: Pad by one on all sides (Open-MAGVIT2); otherwise at the right and the bottom only (the VQGAN family).
    """

    def __init__(self, width: int, even: bool) -> None:
        super().__init__()
        self.even = even
        self.conv = nn.Conv2d(width, width, 3, stride=2, padding=1 if even else 0)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] to [B, C, h/2, w/2]."""
        return self.conv(x if self.even else F.pad(x, (0, 1, 0, 1)))  # type: ignore[no-any-return]


class Up(nn.Module):
    """To twice the grid: nearest neighbours and a 3 x 3 convolution, or a convolution to four places a place."""

    def __init__(self, width: int, depth_to_space: bool) -> None:
        super().__init__()
        self.depth_to_space = depth_to_space
        self.conv = nn.Conv2d(width, 4 * width if depth_to_space else width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] to [B, C, 2h, 2w]."""
        if not self.depth_to_space:
            return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))  # type: ignore[no-any-return]
        y: Tensor = self.conv(x)
        b, _, h, w = y.shape
        y = y.view(b, 2, 2, -1, h, w)  # the row and the column within a place are the slowest of the channels
        return y.permute(0, 3, 4, 1, 5, 2).reshape(b, -1, 2 * h, 2 * w)


class AdaptiveNorm(nn.Module):
    """A group norm whose gain and bias are linear in the deviation and the mean of the codes (Open-MAGVIT2).

    The variance over the grid is unbiased, plus 1e-6 below the root.
    """

    def __init__(self, levels: Levels, width: int, code_width: int) -> None:
        super().__init__()
        self.norm = levels.norm(width, affine=False)
        self.gamma, self.beta = nn.Linear(code_width, width), nn.Linear(code_width, width)

    def forward(self, x: Tensor, codes: Tensor) -> Tensor:
        """[B, C, h, w] and the quantised vectors [B, K, h', w'] to [B, C, h, w]."""
        flat = codes.flatten(2)  # [B, K, n]
        deviation = (flat.var(-1, correction=min(1, flat.shape[-1] - 1)) + EPS).sqrt()
        gain, bias = self.gamma(deviation), self.beta(flat.mean(-1))  # [B, C]
        return gain[..., None, None] * self.norm(x) + bias[..., None, None]  # type: ignore[no-any-return]


class Level(nn.Module):
    """The blocks of one grid, with an attention after each where the level has them; ``down`` or ``up`` follows."""

    def __init__(self, levels: Levels, number: int, fan_in: int) -> None:
        super().__init__()
        width, count = levels.widths[number], levels.blocks[number]
        self.entry: AdaptiveNorm | None = None
        self.blocks = nn.ModuleList(Residual(levels, fan_in if i == 0 else width, width) for i in range(count))
        self.attention = nn.ModuleList(
            Attention(levels, width) for _ in range(count if levels.attention[number] else 0)
        )
        self.down: Down | None = None
        self.up: Up | None = None

    def forward(self, x: Tensor, codes: Tensor | None = None) -> Tensor:
        """[B, C, h, w] to the next level's grid; ``codes`` are what an adaptive norm reads."""
        if self.entry is not None and codes is not None:
            x = self.entry(x, codes)
        for number, block in enumerate(self.blocks):
            x = block(x)
            if len(self.attention):
                x = self.attention[number](x)
        for step in (self.down, self.up):
            x = x if step is None else step(x)
        return x


def _middle(levels: Levels) -> nn.ModuleList:
    width = levels.widths[-1]
    parts: list[nn.Module] = [Residual(levels, width, width) for _ in range(levels.middle)]
    if levels.middle_attention:
        parts.insert(1, Attention(levels, width))
    return nn.ModuleList(parts)


class ConvEncoder(nn.Module):
    """``stem``, ``levels``, ``middle``, ``norm``, ``head``.

    Args:
        levels: Sizes.
        out: Channels at the code grid.
        fan_in: Channels of the image.
        even: See ``Down``.
        kernel: Side of the last convolution.
    """

    def __init__(self, levels: Levels, out: int, *, fan_in: int = 3, even: bool = False, kernel: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(fan_in, levels.base, 3, padding=1, bias=levels.bias)
        self.levels, width = nn.ModuleList(), levels.base
        for number, own in enumerate(levels.widths):
            level = Level(levels, number, width)
            if number + 1 < len(levels.widths):
                level.down = Down(own, even)
            self.levels.append(level)
            width = own
        self.middle = _middle(levels)
        self.norm = levels.norm(width)
        self.head = nn.Conv2d(width, out, kernel, padding=kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] to [B, out, h, w]; the last convolution runs without autocast: signs are taken of what it
        gives."""
        x = self.stem(x)
        for part in (*self.levels, *self.middle):
            x = part(x)
        x = F.silu(self.norm(x))
        with full_precision(x):
            return self.head(x.to(self.head.weight.dtype))  # type: ignore[no-any-return]


class ConvDecoder(nn.Module):
    """``stem``, ``middle``, ``levels`` (run from the last to the first), ``norm``, ``head``.

    Args:
        levels: Sizes; ``base`` is not read.
        fan_in: Channels at the code grid.
        out: Channels of the image.
        depth_to_space: See ``Up``.
        code_width: Width K of the codes that every level's entry is normalised by; 0 = no such norms.
    """

    def __init__(
        self, levels: Levels, fan_in: int, *, out: int = 3, depth_to_space: bool = False, code_width: int = 0
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(fan_in, levels.widths[-1], 3, padding=1)
        self.middle = _middle(levels)
        coarser = (*levels.widths[1:], levels.widths[-1])
        self.levels = nn.ModuleList(Level(levels, number, width) for number, width in enumerate(coarser))
        for number, level in enumerate(self.levels):
            assert isinstance(level, Level)
            if code_width:
                level.entry = AdaptiveNorm(levels, coarser[number], code_width)
            if number:
                level.up = Up(levels.widths[number], depth_to_space)
        self.norm = levels.norm(levels.widths[0])
        self.head = nn.Conv2d(levels.widths[0], out, 3, padding=1)

    def forward(self, x: Tensor, codes: Tensor | None = None) -> Tensor:
        """[B, fan_in, h, w] to [B, out, H, W]; ``codes`` [B, K, h, w] are what the adaptive norms read."""
        x = self.stem(x)
        for part in self.middle:
            x = part(x)
        for level in reversed(self.levels):
            x = level(x, codes)
        return self.head(F.silu(self.norm(x)))  # type: ignore[no-any-return]
