"""What ImageBind's encoders are made of: stems, a trunk with a norm behind it, and the way they start."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn

from zoo.encoders.base import Encoder
from zoo.errors import ConfigError
from zoo.layout import Segment, lay_out
from zoo.nn import Trunk, TrunkConfig, init_xavier_, resize_positions
from zoo.nn.attention import Attention
from zoo.part import Features

EPS = 1e-6
"""Of every norm of the trunks and heads (imagebind_model.py)."""


def trunk_config(
    *, width: int, depth: int, heads: int, ffn: int, bias_kv: bool = False, drop_path: float = 0.0
) -> TrunkConfig:
    """Return a modality's trunk; its output norm is the head's.

    Args:
        bias_kv: Every layer owns a learned key and value, as those of audio, depth, thermal and IMU do.
    """
    return TrunkConfig(
        width=width,
        depth=depth,
        heads=heads,
        ffn=ffn,
        eps=EPS,
        final_norm=False,
        bias_kv=bias_kv,
        drop_path=drop_path,
    )


class Patches(nn.Module):
    """A map or clip to tokens: patches through one matrix without a bias, a norm, CLS, positions.

    Args:
        width: D.
        channels: Of the input.
        kernel, stride: Of the patches, along every axis ([T,] H, W).
        size: Of the input the positions are for.
        patch_norm: A norm (eps 1e-5) on the patches, which images have none of.
        norm: A norm (eps 1e-6) on what comes out, which images alone have.
    """

    def __init__(
        self,
        width: int,
        channels: int,
        kernel: tuple[int, ...],
        stride: tuple[int, ...],
        size: tuple[int, ...],
        *,
        patch_norm: bool = True,
        norm: bool = False,
    ) -> None:
        super().__init__()
        self.kernel, self.stride = kernel, stride
        self.grid = self.grid_of(size)
        tokens = 1 + math.prod(self.grid)
        conv: Any = nn.Conv3d if len(kernel) == 3 else nn.Conv2d
        self.patch = conv(channels, width, kernel, stride, bias=False)
        self.patch_norm = nn.LayerNorm(width, eps=1e-5) if patch_norm else None
        self.cls, self.positions = (nn.Parameter(width**-0.5 * torch.randn(1, n, width)) for n in (1, tokens))
        self.norm = nn.LayerNorm(width, eps=EPS) if norm else None

    def grid_of(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """Patches along every axis of an input of this size."""
        return tuple((n - k) // s + 1 for n, k, s in zip(size, self.kernel, self.stride, strict=True))

    def forward(self, x: Tensor) -> Tensor:
        """Embed ``[B, channels, [T,] H, W]`` to ``[B, 1 + patches, D]``; maps of another size resize the positions
        (bicubic), CLS keeps its own."""
        tokens = self.placed(x)
        return tokens if self.norm is None else cast(Tensor, self.norm(tokens))

    def placed(self, x: Tensor) -> Tensor:
        """The tokens with their positions, before the last norm: what the release's pre-processor returns."""
        tokens: Tensor = self.patch(x).flatten(2).transpose(1, 2)  # [B, N, D]
        if self.patch_norm is not None:
            tokens = self.patch_norm(tokens)
        tokens = torch.cat([self.cls.expand(len(x), -1, -1), tokens], 1)
        table: Tensor = self.positions
        grid = self.grid_of(tuple(x.shape[2:]))
        if grid != self.grid:
            if len(grid) == 3 and grid[0] != 1:
                raise ConfigError(f"{x.shape[2]} frames at once; the encoder reads {self.kernel[0]} a clip")
            table = resize_positions(table, self._plane(self.grid), self._plane(grid))
        return tokens + table

    @staticmethod
    def _plane(grid: tuple[int, ...]) -> tuple[int, int]:
        return grid[-2], grid[-1]


class Windows(nn.Module):
    """Sensor channels to tokens: windows of steps through one matrix, a norm, CLS, positions.

    Args:
        width: D.
        channels: Of the sensor.
        window: Steps a token.
        steps: Of the input.
    """

    def __init__(self, width: int, channels: int, window: int, steps: int) -> None:
        super().__init__()
        self.window = window
        self.patch = nn.Linear(channels * window, width, bias=False)
        self.patch_norm = nn.LayerNorm(width, eps=1e-5)
        self.cls = nn.Parameter(width**-0.5 * torch.randn(1, 1, width))
        self.positions = nn.Parameter(0.01 * torch.randn(1, 1 + steps // window, width))

    def windows(self, x: Tensor) -> Tensor:
        """Cut ``[B, channels, steps]`` into ``[B, steps / window, channels * window]``, channel by channel within a
        window."""
        return x.unfold(-1, self.window, self.window).transpose(1, 2).flatten(2)

    def forward(self, x: Tensor) -> Tensor:
        """Embed ``[B, channels, steps]`` to ``[B, 1 + steps / window, D]``."""
        tokens = self.patch_norm(self.patch(self.windows(x)))
        return torch.cat([self.cls.expand(len(x), -1, -1), tokens], 1) + self.positions


class Bound(Encoder):
    """Tokens through a trunk; ``pooled`` is one of them behind a norm. ``embed``, ``trunk`` and ``norm`` are what the
    release calls pre-processor, trunk, and the norm of the head, whose matrix is the wiring's.

    Args:
        embed: Makes the tokens.
        trunk: Of the blocks.
        tokens: Tokens an item.
        causal: Tokens read what is before them only.
        dropout: Before the head's matrix.
    """

    def __init__(
        self, embed: nn.Module, trunk: TrunkConfig, tokens: int, *, causal: bool = False, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.width = self.pooled_width = trunk.width
        self.tokens = tokens
        self.causal = causal
        self.embed = embed
        self.trunk = Trunk(trunk)
        start_(self.trunk)
        self.norm = nn.LayerNorm(trunk.width, eps=EPS)
        self.dropout = nn.Dropout(dropout)

    def hidden(self, tokens: Tensor) -> Tensor:
        """The trunk's states [B, N, D] of tokens [B, N, D]."""
        layout = lay_out([Segment("tokens", tokens.shape[1])], device=tokens.device) if self.causal else None
        return cast(Tensor, self.trunk(tokens, layout))

    def pool(self, states: Tensor) -> Tensor:
        """The head's input [B, D] of the chosen states [B, D]."""
        pooled: Tensor = self.dropout(self.norm(states))
        return pooled

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Features:
        """Encode what ``embed`` reads.

        Returns:
            ``tokens`` [B, N, width], the trunk's states without a norm, CLS first, and ``pooled`` [B, width], CLS
            behind the head's norm.
        """
        hidden = self.hidden(self.embed(x))
        return Features(hidden, None, self.pool(hidden[:, 0]))


@torch.no_grad()
def start_(trunk: Trunk) -> None:
    """Start a trunk as the release does: Xavier-uniform matrices, but queries, keys and values as one matrix [3 D, D]
    of ``nn.MultiheadAttention``, whose Xavier bound is smaller by the square root of two."""
    init_xavier_(trunk)
    for module in trunk.modules():
        if isinstance(module, Attention):
            for part in (module.q, module.k, module.v):
                cast(nn.Linear, part).weight.mul_(2**-0.5)
