"""A gated projector: layer norm, then a SwiGLU feed-forward from the encoder's width to the decoder's."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional

from zoo.connectors.base import Connector, ConnectorConfig
from zoo.part import Features


class GatedMLP(Connector):
    """``down(silu(gate(n)) * up(n))`` with ``n = LayerNorm(x)`` (SwiGLU: Shazeer 2020, arXiv:2002.05202, equation 6).

    Every token is mapped by itself, so their number, mask and grid stay as they were.
    """

    def __init__(self, in_width: int, in_tokens: int, out_width: int, hidden: int) -> None:
        super().__init__()
        self.width = out_width
        self.tokens = in_tokens
        self.norm = nn.LayerNorm(in_width)
        self.gate = nn.Linear(in_width, hidden, bias=False)
        self.up = nn.Linear(in_width, hidden, bias=False)
        self.down = nn.Linear(hidden, out_width)

    def forward(self, features: Features, text: Features | None = None) -> Features:
        """Map tokens [B, N, in_width] to [B, N, out_width]; ``text`` is not read."""
        normed: Tensor = self.norm(features.tokens)  # [B, N, in_width]
        hidden = functional.silu(self.gate(normed)) * self.up(normed)  # [B, N, hidden]
        return Features(self.down(hidden), mask=features.mask, grid=features.grid)


@dataclass(frozen=True, kw_only=True)
class GatedMLPConfig(ConnectorConfig):
    """The gated projector.

    Attributes:
        expansion: Hidden width over output width. 8/3 would match a plain MLP of expansion 4 in parameters.
    """

    expansion: float = 8 / 3

    def __post_init__(self) -> None:
        if self.expansion <= 0:
            raise ValueError(f"expansion = {self.expansion} must be above 0")

    def build(self, *, in_width: int, in_tokens: int, out_width: int) -> GatedMLP:
        return GatedMLP(in_width, in_tokens, out_width, hidden=max(1, round(self.expansion * out_width)))
