"""Heads behind a trunk."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.nn.norm import Linear


class MLMHead(nn.Module):
    """BERT's language modelling head: dense, GELU, norm, then the token table as matrix with a bias of its own.

    Args:
        width: D.
        vocab: V.
        eps: of the norm; BERT's 1e-12.
        std: of the initial matrix.
    """

    def __init__(self, width: int, vocab: int, *, eps: float = 1e-12, std: float = 0.02) -> None:
        super().__init__()
        self.dense = Linear(width, width, True, std=std)
        self.norm = nn.LayerNorm(width, eps=eps)
        self.bias = nn.Parameter(torch.zeros(vocab))

    def forward(self, hidden: Tensor, table: Tensor) -> Tensor:
        """Return logits ``[..., V]`` of ``hidden`` ``[..., D]``; ``table`` is the token table ``[V, D]``."""
        return F.linear(self.norm(F.gelu(self.dense(hidden))), table, self.bias)
