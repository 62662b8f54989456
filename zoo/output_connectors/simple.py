"""Output connectors that treat every state alone: one linear map, an MLP. What the others are compared with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor

from zoo.connectors.simple import mlp
from zoo.output_connectors.base import OutputConnector, OutputConnectorConfig


@dataclass(frozen=True, kw_only=True)
class TokenWiseConfig(OutputConnectorConfig):
    """Each state becomes one token of the condition.

    Attributes:
        depth: Linear maps, exact GELU between. It names the connector, so ``scale`` leaves it alone.
        hidden: Width between them; 0 = the condition's.
    """

    depth: int = 1
    hidden: int = 0

    def __post_init__(self) -> None:
        if self.depth < 1 or self.hidden < 0:
            raise ValueError(f"depth = {self.depth} must be 1 or more, hidden = {self.hidden} 0 or more")

    def scaled(self, sizes: Mapping[str, Any]) -> Self:
        return self

    def build(
        self, *, in_width: int, in_tokens: int, out_width: int, image_width: int = 0, image_tokens: int = 0
    ) -> TokenWise:
        return TokenWise(self, in_width, in_tokens, out_width)


class TokenWise(OutputConnector):
    """``fc`` over every state; what is compared with the caption is the condition."""

    def __init__(self, config: TokenWiseConfig, in_width: int, in_tokens: int, out_width: int) -> None:
        super().__init__()
        self.width, self.outputs = out_width, in_tokens
        self.aligned = (in_tokens, out_width)
        self.fc = mlp([in_width, *[config.hidden or out_width] * (config.depth - 1), out_width])

    def align(self, states: Tensor, mask: Tensor | None = None) -> Tensor:
        """[N, S, D_in] -> [N, S, width]; a state that is not there becomes zeros."""
        out: Tensor = self.fc(states)
        return out if mask is None else out * mask[..., None]
