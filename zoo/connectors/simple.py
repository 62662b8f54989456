"""Connectors that treat every token alone: identity, one linear map, an MLP."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from zoo.connectors.base import Connector, ConnectorConfig
from zoo.errors import ConfigError
from zoo.part import Features


def mlp(widths: list[int], act: type[nn.Module] = nn.GELU) -> nn.Sequential:
    """Linears between ``widths`` with exact GELU between; modules 0, 2, ... are the linears, as LLaVA names them."""
    layers: list[nn.Module] = [nn.Linear(widths[0], widths[1])]
    for a, b in itertools.pairwise(widths[1:]):
        layers += [act(), nn.Linear(a, b)]
    return nn.Sequential(*layers)


class TokenWise(Connector):
    """Applies ``proj`` to every token; mask and grid pass through, the pooled vector does not.

    Args:
        pool: Side of the square of neighbouring patches that are averaged first; tokens before the grid (the class
            token) are then dropped.
    """

    def __init__(self, proj: nn.Module, *, tokens: int, width: int, pool: int = 1) -> None:
        super().__init__()
        self.proj = proj
        self.tokens = tokens
        self.width = width
        self.pool = pool

    def forward(self, features: Features, text: Features | None = None) -> Features:
        if self.pool > 1:
            features = averaged(features, self.pool)
        tokens: Tensor = self.proj(features.tokens)  # [B, N, D_in] -> [B, N, D_out]
        return Features(tokens, mask=features.mask, grid=features.grid)


def averaged(features: Features, side: int) -> Features:
    """Means over squares of ``side`` x ``side`` patches: [B, ... + h*w, D] -> [B, h/side * w/side, D].

    Raises:
        ConfigError: No grid of patches, tokens left out, or a grid that ``side`` does not divide.
    """
    if features.grid is None or features.mask is not None:
        raise ConfigError("connector.pool averages whole grids of patches, and this encoder gives none: set it to 1")
    height, width = features.grid
    if height % side or width % side:
        raise ConfigError(f"connector.pool = {side} does not divide the {height} x {width} grid of patches")
    tokens = features.tokens[:, -height * width :]
    tokens = tokens.view(len(tokens), height // side, side, width // side, side, -1)  # [B, h/s, s, w/s, s, D]
    return Features(tokens.mean((2, 4)).flatten(1, 2), grid=(height // side, width // side))


def side_for(tokens: int, in_tokens: int) -> int:
    """Side of the squares of patches that, made one token each, leave ``tokens`` of ``in_tokens``.

    Raises:
        ConfigError: No such side.
    """
    grid = math.isqrt(in_tokens)
    side = grid // max(1, math.isqrt(tokens))
    if tokens < 1 or grid * grid not in (in_tokens, in_tokens - 1) or (grid / max(side, 1)) ** 2 != tokens:
        possible = [(grid // s) ** 2 for s in range(1, grid + 1) if grid % s == 0]
        raise ConfigError(
            f"{in_tokens} tokens of the encoder cannot become {tokens} by squares of patches: expected one of"
            f" {', '.join(map(str, possible))}"
        )
    return side


def pooled_tokens(in_tokens: int, side: int) -> int:
    """Tokens left of ``in_tokens``, a square grid with or without one token before it.

    Raises:
        ConfigError: No such grid, or ``side`` does not divide its side.
    """
    if side == 1:
        return in_tokens
    grid = math.isqrt(in_tokens)
    if grid * grid not in (in_tokens, in_tokens - 1) or grid % side:
        raise ConfigError(f"connector.pool = {side} cannot average {in_tokens} tokens: expected a grid it divides")
    return (grid // side) ** 2


@dataclass(frozen=True, kw_only=True)
class IdentityConfig(ConnectorConfig):
    """Hands the encoder's tokens to the decoder as they are."""

    def build(self, *, in_width: int, in_tokens: int, out_width: int) -> TokenWise:
        """Raises ConfigError where the widths differ."""
        if in_width != out_width:
            raise ConfigError(
                f"connector 'identity' cannot join an encoder of width {in_width} to a decoder of width {out_width}:"
                " choose equal widths, or connector=linear"
            )
        return TokenWise(nn.Identity(), tokens=in_tokens, width=out_width)


@dataclass(frozen=True, kw_only=True)
class LinearConfig(ConnectorConfig):
    """One linear map with bias (LLaVA, arXiv 2304.08485, section 4.1).

    Attributes:
        pool: Side of the square of patches whose mean becomes one token, for comparisons at equal numbers of tokens.
    """

    pool: int = 1

    def __post_init__(self) -> None:
        if self.pool < 1:
            raise ValueError(f"pool = {self.pool} must be 1 or more")

    def with_tokens(self, tokens: int, in_tokens: int) -> Self:
        return replace(self, pool=side_for(tokens, in_tokens))

    def build(self, *, in_width: int, in_tokens: int, out_width: int) -> TokenWise:
        tokens = pooled_tokens(in_tokens, self.pool)
        return TokenWise(nn.Linear(in_width, out_width), tokens=tokens, width=out_width, pool=self.pool)


@dataclass(frozen=True, kw_only=True)
class MLPConfig(ConnectorConfig):
    """``mlpNx_gelu`` of LLaVA-1.5 (arXiv 2310.03744, section 3.2): N linears of the decoder's width, exact GELU
    between.

    Attributes:
        depth: Number of linears. It names the connector (mlp2x), so ``scale`` leaves it alone.
        pool: As of ``linear``.
        hidden: Width between the linears; 0 = the decoder's, as published.
    """

    later_fields: ClassVar[frozenset[str]] = frozenset({"hidden"})
    sized_by: ClassVar[str] = "hidden"

    depth: int = 2
    pool: int = 1
    hidden: int = 0

    def __post_init__(self) -> None:
        if min(self.depth, self.pool) < 1 or self.hidden < 0:
            raise ValueError(
                f"depth = {self.depth} and pool = {self.pool} must be 1 or more, hidden = {self.hidden} 0 or more"
            )

    def scaled(self, sizes: Mapping[str, Any]) -> Self:
        return self

    def with_tokens(self, tokens: int, in_tokens: int) -> Self:
        return replace(self, pool=side_for(tokens, in_tokens))

    def build(self, *, in_width: int, in_tokens: int, out_width: int) -> TokenWise:
        tokens = pooled_tokens(in_tokens, self.pool)
        widths = [in_width, *[self.hidden or out_width] * (self.depth - 1), out_width]
        return TokenWise(mlp(widths), tokens=tokens, width=out_width, pool=self.pool)
