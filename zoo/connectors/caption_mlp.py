"""LlamaGen's caption embedder: features of a frozen text encoder become the tokens an image is written behind."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from zoo.connectors.base import Connector, ConnectorConfig
from zoo.part import Features


@dataclass(frozen=True, kw_only=True)
class CaptionMLPConfig(ConnectorConfig):
    """Two matrices without biases, tanh GELU between (gpt.py, CaptionEmbedder)."""

    def build(self, *, in_width: int, in_tokens: int, out_width: int) -> CaptionMLP:
        return CaptionMLP(in_width, in_tokens, out_width)


class CaptionMLP(Connector):
    """``fc1`` and ``fc2``; without biases a pad of zeros stays one."""

    def __init__(self, in_width: int, in_tokens: int, out_width: int) -> None:
        super().__init__()
        self.width, self.tokens = out_width, in_tokens
        self.fc1 = nn.Linear(in_width, out_width, bias=False)
        self.fc2 = nn.Linear(out_width, out_width, bias=False)

    def forward(self, features: Features, text: Features | None = None) -> Features:
        tokens: Tensor = self.fc2(F.gelu(self.fc1(features.tokens), approximate="tanh"))  # [B, N, D]
        return Features(tokens, mask=features.mask, grid=features.grid)
