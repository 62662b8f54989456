"""Connectors that treat every token alone: identity, one linear map, an MLP."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

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
    """Applies ``proj`` to every token; mask and grid pass through, the pooled vector does not."""

    def __init__(self, proj: nn.Module, *, tokens: int, width: int) -> None:
        super().__init__()
        self.proj = proj
        self.tokens = tokens
        self.width = width

    def forward(self, features: Features, text: Features | None = None) -> Features:
        tokens: Tensor = self.proj(features.tokens)  # [B, N, D_in] -> [B, N, D_out]
        return Features(tokens, mask=features.mask, grid=features.grid)


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
    """One linear map with bias (LLaVA, arXiv 2304.08485, section 4.1)."""

    def build(self, *, in_width: int, in_tokens: int, out_width: int) -> TokenWise:
        return TokenWise(nn.Linear(in_width, out_width), tokens=in_tokens, width=out_width)


@dataclass(frozen=True, kw_only=True)
class MLPConfig(ConnectorConfig):
    """``mlpNx_gelu`` of LLaVA-1.5 (arXiv 2310.03744, section 3.2): N linears of the decoder's width, exact GELU
    between.

    Attributes:
        depth: Number of linears. It names the connector (mlp2x), so ``scale`` leaves it alone.
    """

    depth: int = 2

    def __post_init__(self) -> None:
        if self.depth < 1:
            raise ValueError(f"depth = {self.depth} must be 1 or more")

    def scaled(self, sizes: Mapping[str, Any]) -> Self:
        return self

    def build(self, *, in_width: int, in_tokens: int, out_width: int) -> TokenWise:
        return TokenWise(mlp([in_width] + [out_width] * self.depth), tokens=in_tokens, width=out_width)
