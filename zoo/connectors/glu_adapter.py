"""CogVLM's adapter: every token through a gated MLP of the decoder's size, learned ends around the image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.connectors.base import Connector, ConnectorConfig
from zoo.nn import TrunkConfig
from zoo.nn.block import FFN
from zoo.nn.norm import Linear
from zoo.part import Features


@dataclass(frozen=True, kw_only=True)
class GLUAdapterConfig(ConnectorConfig):
    """CogVLM's MLP adapter (arXiv 2311.03079, section 2.1; the released GLU and its boi, eoi).

    Attributes:
        ffn: Hidden width of the SwiGLU, that of the decoder's.
        eps: Of the norm.
    """

    sized_by: ClassVar[str] = "ffn"

    ffn: int = 11008
    eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.ffn < 1:
            raise ValueError(f"ffn = {self.ffn} must be 1 or more")

    def build(self, *, in_width: int, in_tokens: int, out_width: int) -> GLUAdapter:
        return GLUAdapter(self, in_width, in_tokens, out_width)


class GLUAdapter(Connector):
    """boi, then down(silu(gate(y)) * up(y)) of y = gelu(norm(linear(x))) for every token, then eoi.

    ``linear``, ``norm``, ``ffn``, and the vectors ``boi`` and ``eoi``, which start at 0; no biases but the norm's.
    """

    def __init__(self, config: GLUAdapterConfig, in_width: int, in_tokens: int, out_width: int) -> None:
        super().__init__()
        self.width = out_width
        self.tokens = in_tokens + 2
        self.linear = Linear(in_width, out_width, bias=False)
        self.norm = nn.LayerNorm(out_width, eps=config.eps)
        gated = TrunkConfig(width=out_width, depth=0, heads=1, ffn=config.ffn, act="silu", gated=True, ffn_bias=False)
        self.ffn = FFN(gated)
        self.boi, self.eoi = (nn.Parameter(torch.zeros(1, 1, out_width)) for _ in range(2))

    def forward(self, features: Features, text: Features | None = None) -> Features:
        """[B, N, in_width] -> [B, N + 2, out_width]."""
        x: Tensor = self.ffn(F.gelu(self.norm(self.linear(features.tokens))))  # [B, N, D]
        boi, eoi = (end.to(x.dtype).expand(x.shape[0], -1, -1) for end in (self.boi, self.eoi))
        mask = None if features.mask is None else F.pad(features.mask, (1, 1), value=True)
        return Features(torch.cat([boi, x, eoi], dim=1), mask=mask)
