"""Neighbouring tokens put side by side and mapped by one linear: MiniGPT-4 with LLaMA-2, which has no Q-Former."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor, nn

from zoo.connectors.base import Connector, ConnectorConfig
from zoo.errors import ConfigError
from zoo.part import Features


class TokenMerge(Connector):
    """``proj(merge(ln_vision(patches)))``: ``factor`` tokens that follow each other become one; tokens in front of the
    patches (the class token) are dropped."""

    def __init__(self, config: TokenMergeConfig, in_width: int, patches: int, out_width: int) -> None:
        super().__init__()
        self.factor = config.factor
        self.patches = patches
        self.tokens = patches // config.factor
        self.width = out_width
        self.ln_vision = nn.LayerNorm(in_width, eps=config.input_eps) if config.input_norm else nn.Identity()
        self.proj = nn.Linear(in_width * config.factor, out_width)

    def forward(self, features: Features, text: Features | None = None) -> Features:
        if features.mask is not None:
            raise ConfigError(
                "connector 'token-merge' joins whole rows of patches and cannot leave tokens out: choose mlp"
            )
        x = self.ln_vision(features.tokens)[:, -self.patches :]  # [B, N, D]
        merged = x.reshape(x.shape[0], self.tokens, self.factor * x.shape[2])  # [B, N / f, f * D]
        tokens: Tensor = self.proj(merged)
        return Features(tokens)


@dataclass(frozen=True, kw_only=True)
class TokenMergeConfig(ConnectorConfig):
    """MiniGPT-4's LLaMA-2 path (minigpt4.py, encode_img): 256 patches become 64 tokens of 4 x 1408.

    Attributes:
        factor: Tokens that become one.
        input_norm: A LayerNorm on the image tokens (``ln_vision`` of LAVIS).
        input_eps: Of that norm.
    """

    factor: int = 4
    input_norm: bool = True
    input_eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.factor < 1:
            raise ValueError(f"factor = {self.factor} must be 1 or more")

    def build(self, *, in_width: int, in_tokens: int, out_width: int) -> TokenMerge:
        """Raises ConfigError where no square grid of ``in_tokens`` patches (with or without a class token) divides by
        the factor."""
        patches = next((n for n in (in_tokens, in_tokens - 1) if n > 0 and math.isqrt(n) ** 2 == n), in_tokens)
        if patches % self.factor:
            raise ConfigError(
                f"connector 'token-merge' cannot join {patches} patches by {self.factor}:"
                " choose a factor that divides them"
            )
        return TokenMerge(self, in_width, patches, out_width)
